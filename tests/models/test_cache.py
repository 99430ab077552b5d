"""The cache's borders: nothing is written outside of them, whoever asks."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES
from cpu_paths import same
from oracle import assert_logits_close, draw_prompts, load, our_bundled
from quantizing import MODELS, VOCAB, saved

from qllm.models.cache import KVCache
from qllm.models.logits import finish_logits
from qllm.ops import phase
from qllm.ops.cpu import library

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = draw_prompts([9, 4, 11], 4096)


def tensors(cache) -> list[torch.Tensor]:
    return [part for layer in (*cache.layers, *cache.states.values()) for part in layer]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_can_be_filled_to_the_end(family):
    model = our_bundled(family)
    tight, wide = model.new_cache(3, 14), model.new_cache(3, 40)
    assert same(model.prefill(PROMPTS, tight), model.prefill(PROMPTS, wide))
    for token in range(3):
        tokens = torch.tensor([token, 7, 9])
        assert same(model.decode(tokens, tight), model.decode(tokens, wide))
    assert tight.lengths == [12, 7, 14]
    before = [part.clone() for part in tensors(tight)]
    for _ in range(2):
        with pytest.raises(IndexError, match=r"^15 tokens in a cache for 14$"):
            model.decode(tokens, tight)
        assert tight.lengths == [12, 7, 14]
        assert all(map(same, tensors(tight), before))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_token_beyond_the_end_is_refused(family):
    model = our_bundled(family)
    cache = model.new_cache(1, 5)
    model.prefill([[1, 2, 3, 4, 5]], cache)
    with pytest.raises(IndexError, match=r"^6 tokens in a cache for 5$"):
        model.decode(torch.tensor([1]), cache)
    assert cache.captured is None


def test_a_prompt_that_does_not_fit_is_refused():
    model = our_bundled("opt")
    cache = model.new_cache(3, 10)
    with pytest.raises(IndexError, match=r"^11 tokens in a cache for 10$"):
        model.prefill(PROMPTS, cache)
    assert not any(part.any() for part in tensors(cache))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_cache_has_one_row_per_prompt(rows):
    cache = our_bundled("opt").new_cache(rows, 20)
    with pytest.raises(ValueError, match=f"^3 prompts for a cache of {rows} rows$"):
        our_bundled("opt").prefill(PROMPTS, cache)
    assert not any(part.any() for part in tensors(cache))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_holds_the_same_however_its_tokens_came(family):
    """As a prompt or one by one: only attention, behind the first keys, sums in another order."""
    model = our_bundled(family, "4")
    whole, single = model.new_cache(3, 20), model.new_cache(3, 20)
    last = model.prefill([prompt[:4] for prompt in PROMPTS], whole)
    model.prefill([prompt[:1] for prompt in PROMPTS], single)
    for i in range(1, 4):
        logits = model.decode(torch.tensor([prompt[i] for prompt in PROMPTS]), single)
    for a, b in zip(zip(*whole.layers, strict=True), zip(*single.layers, strict=True), strict=True):
        assert same(a[0], b[0])
        assert_logits_close(torch.stack(a), torch.stack(b))
        assert not any(part[:, :, 4:].any() for part in (*a, *b))
    assert_logits_close(logits, last)


@torch.inference_mode()
def as_in_a_step(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states as a step has them, which those of prompts' last tokens are."""
    with phase.decode():
        return finish_logits(model.config, model._head(hidden), torch.float32)


@pytest.mark.parametrize(
    ("family", "bitwidth", "kv_bits"),
    [("opt", "4", 16), ("bloom", "16", 8), ("llama", "8:tc-li", 4), ("llama", "4", 8)],
)
def test_a_prompt_may_come_in_pieces(family, bitwidth, kv_bits, shallow_of, monkeypatch):
    """In passes of any size, or as turns of a chat: no bit depends on it, behind it neither."""
    model = load(shallow_of(family), bitwidth)
    monkeypatch.setattr(model, "kv_bits", kv_bits)
    prompts = draw_prompts([70, 3, 41], 4096)
    whole, pieces, turns = (model.new_cache(3, 80) for _ in range(3))
    want = model.prefill(prompts, whole)
    everything = model.prefill(prompts, model.new_cache(3, 80), last=False)
    assert same(want, as_in_a_step(model, model.hidden(prompts)[[69, 72, 113]]))
    for tokens in (7, 64, 72):
        pieces.pass_tokens = tokens
        pieces.reset()
        assert same(model.prefill(prompts, pieces), want)
        assert pieces.lengths == [70, 3, 41]
        pieces.reset()
        assert same(model.prefill(prompts, pieces, last=False), everything)
    for run in (slice(0, 2), slice(2, 33), slice(33, None)):
        rows = [row for row, prompt in enumerate(prompts) if prompt[run]]
        last = model.prefill([prompts[row][run] for row in rows], turns, rows=rows)
    assert same(last, want[[0, 2]])
    tokens = torch.tensor([5, 6, 7])
    want = model.decode(tokens, whole)
    assert same(model.decode(tokens, pieces), want) and same(model.decode(tokens, turns), want)
    for layer, *others in zip(*(cache.layers for cache in (whole, pieces, turns)), strict=True):
        for other in others:  # of integers, what is behind the newest token may be anything
            assert all(map(same, layer[:6], other[:6]))


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layer_does_what_is_asked_for(name, tmp_path):
    """Of all tokens but the last ones it makes keys and values alone, and the same to the bit."""
    model = load(saved(name, tmp_path), "4")
    prompts = draw_prompts([13, 1, 9], VOCAB)
    rows = [[], []]
    for i, layer in enumerate((model.layers[0], model.layers[-1])):
        layer.mlp.register_forward_hook(lambda m, x, y, i=i: rows[i].append(len(y)))
    part, whole = model.new_cache(3, 20), model.new_cache(3, 20)
    want = as_in_a_step(model, model.hidden(prompts, whole)[[12, 13, 22]])
    assert same(model.prefill(prompts, part), want)
    assert same(model.prefill(prompts), want)
    assert rows == [[23, 23, 23], [23, 3, 3]]
    assert all(map(same, tensors(part), tensors(whole)))


@pytest.mark.parametrize(("family", "kv_bits"), [("opt", 16), ("bloom", 4), ("llama", 8)])
def test_rows_begin_and_end_by_themselves(family, kv_bits, shallow_of, monkeypatch):
    """What a row's tokens are does not depend on which others are there, nor on its row."""
    model = load(shallow_of(family), "4")
    monkeypatch.setattr(model, "kv_bits", kv_bits)
    prompts = draw_prompts([61, 4, 63, 20, 66], 4096, seed=3)
    forced = draw_prompts([6] * 5, 4096, seed=4)

    def alone(sequence: int, first: int, steps: int) -> torch.Tensor:
        cache = model.new_cache(1, 80)
        model.prefill([prompts[sequence]], cache)
        tokens = torch.tensor(forced[sequence])
        return [model.decode(tokens[i : i + 1], cache) for i in range(steps)][first:]

    cache = model.new_cache(3, 80)
    model.prefill(prompts[:3], cache)

    def step(sequences: dict[int, int]) -> None:
        """Each sequence's token of this number."""
        tokens = torch.tensor([forced[sequence][i] for sequence, i in sequences.items()])
        logits = model.decode(tokens, cache)
        for (sequence, i), row in zip(sequences.items(), logits, strict=True):
            assert same(row[None], alone(sequence, i, i + 1)[0])

    step({0: 0, 1: 0, 2: 0})
    cache.keep([0, 2])
    assert cache.live == [0, 2] and cache.lengths == [62, 0, 64]
    step({0: 1, 2: 1})
    assert cache.step.size == 2
    with pytest.raises(ValueError, match=r"^row 1 of the cache is not in use$"):
        model.prefill(prompts[3:4], cache, rows=[1])
    assert cache.start() == [1]
    with pytest.raises(IndexError, match=r"^1 more sequences for a cache of 3 rows$"):
        cache.start()
    model.prefill(prompts[3:4], cache, rows=[1])
    step({0: 2, 2: 2, 3: 0})
    cache.keep([2, 1])
    step({3: 1, 2: 3})
    assert cache.start() == [0]
    model.prefill(prompts[4:], cache, rows=[0])
    step({3: 2, 2: 4, 4: 0})


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_a_cache_goes_as_soon_as_nobody_has_it(kv_bits, monkeypatch):
    """Without waiting for garbage to be collected: a text's would stay beside the next one's."""
    model = our_bundled("llama")
    monkeypatch.setattr(model, "kv_bits", kv_bits)
    gc.disable()
    try:
        cache = model.new_cache(2, 8)
        model.prefill([[1, 2], [3]], cache)
        for _ in range(2):  # the second step is replayed
            model.decode(torch.tensor([4, 5]), cache)
        elsewhere = cache.step.on(torch.device("meta"))
        assert elsewhere.tokens is cache.step.tokens and elsewhere.positions.is_meta
        held = weakref.ref(cache), weakref.ref(elsewhere)
        del cache, elsewhere
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()


def test_a_row_that_has_ended_gives_its_memory_back():
    config = replace(our_bundled("llama").config, num_layers=1, num_kv_heads=4, head_dim=64)
    cache = KVCache(config, 3, 3 * library.HUGE_PAGE // 1024, torch.float32, "cpu")
    for part in tensors(cache):
        part.fill_(1)
    cache.keep([0, 2])
    for part in tensors(cache):
        assert part[[0, 2]].all()
        assert part[1].count_nonzero() * 4 <= library.HUGE_PAGE  # of which it shares two


@pytest.mark.parametrize(("family", "kv_bits"), [("opt", 8), ("bloom", 4), ("llama", 4)])
def test_decoding_finds_what_prefill_does(family, kv_bits, monkeypatch):
    """With keys and values of few bits: which of them a token sees depends on its place alone."""
    model, steps = our_bundled(family), 12
    prompts = draw_prompts([136, 70, 20], 4096)
    exact = model.prefill(prompts, last=False)
    monkeypatch.setattr(model, "kv_bits", kv_bits)
    want = model.prefill(prompts, last=False)
    assert 0 < (want - exact).square().mean() < {8: 1e-4, 4: 1e-2}[kv_bits] * exact.var()
    cache = model.new_cache(3, 136)
    size = sum(part.nbytes for part in tensors(cache))
    assert size == model.cache_bytes(3, 136)
    assert size == sum(KVCache.sizes(model.config, 3, 136, torch.float32, kv_bits))
    model.prefill([prompt[:-steps] for prompt in prompts], cache)
    rows = [row[-steps:] for row in want.split([136, 70, 20])]
    for step in range(steps):
        got = model.decode(torch.tensor([prompt[step - steps] for prompt in prompts]), cache)
        assert_logits_close(got, torch.stack([row[step] for row in rows]), 2e-3)


def test_a_state_goes_on_or_begins_anew(tmp_path):
    """A row's next text begins with zeros, and no text goes on from tokens that are let go."""
    model = load(saved("qwen3_5", tmp_path))
    first, second = draw_prompts([9, 5], VOCAB)
    cache = model.new_cache(2, 40)
    whole = model.prefill([first + second])
    model.prefill([second, first], cache)
    assert cache.rewind(0, 4) == 0 and cache.rewind(1, 9) == 9
    assert same(model.prefill([first + second, second], cache, rows=[0, 1])[:1], whole)
    assert same(
        model.prefill([second, first], model.new_cache(2, 40)), model.prefill([second, first])
    )
    cache.keep([1])
    assert cache.start() == [0] and cache.live == [1, 0]
    assert same(model.prefill([first + second], cache, rows=[0]), whole)
    model.decode(torch.tensor([1, 2]), cache)
    assert cache.rewind(0, 14) == 0 and cache.rewind(1, 15) == 15
    cache.reserve([1], [3])  # of a pass that was interrupted
    assert cache.rewind(1, 15) == 0
