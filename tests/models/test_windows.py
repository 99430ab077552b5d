"""Layers with a window hold no more than that and a pass: nothing else is different."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from cpu_paths import same
from oracle import assert_logits_close, draw_prompts, prefill_logits, random_model, save
from transformers import Gemma2Config, MistralConfig

from qllm.models import cache as kv_cache
from qllm.models.cache import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW, CAPACITY, PASS = 70, 420, 24
HELD = 192  # the runs of 64 tokens that 69 + 24 may touch
SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 500,
    "sliding_window": WINDOW,
}
PROMPTS = draw_prompts([390, 3, 128, 191], 90)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """transformers' model with a window in every other layer, and ours."""
    theirs = random_model(Gemma2Config(**SIZES))
    return theirs, save(theirs, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """Ours with a window in each layer."""
    return save(random_model(MistralConfig(**SIZES)), tmp_path_factory.mktemp("windowed"))


@pytest.fixture
def short_passes(monkeypatch):
    monkeypatch.setattr(kv_cache, "PREFILL_TOKENS", PASS)


def whole_cache(model, monkeypatch, rows: int) -> KVCache:
    """One whose layers hold all tokens, which come at once."""
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "PREFILL_TOKENS", 2048)
        cache = model.new_cache(rows, CAPACITY)
    assert {kv.keys.shape[0] for kv in cache.layers} == {rows}
    assert all(kv.capacity >= CAPACITY for kv in cache.layers)
    return cache


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.usefixtures("short_passes")
def test_tokens_are_those_of_a_cache_that_holds_all(kv_bits, mixed, windowed, monkeypatch):
    """In prompts that come in pieces, in steps behind them, and for whom a row begins anew."""
    for model, held in ((mixed[1], [HELD, CAPACITY]), (windowed, [HELD, HELD])):
        monkeypatch.setattr(model, "kv_bits", kv_bits)
        cache, whole = model.new_cache(4, CAPACITY), whole_cache(model, monkeypatch, 4)
        rounded = [size if kv_bits == 16 else -(-size // 64) * 64 for size in held]
        assert [kv.capacity for kv in cache.layers] == rounded
        size = sum(part.nbytes for kv in cache.layers for part in kv)
        assert model.cache_bytes(4, CAPACITY) == size
        assert same(model.prefill(PROMPTS, cache), model.prefill(PROMPTS, whole))
        forced = torch.tensor(draw_prompts([30] * 4, 90, seed=1))
        for step in range(25):
            tokens = forced[: len(cache.live), step]
            assert same(model.decode(tokens, cache), model.decode(tokens, whole))
            if step == 20:
                for each in (cache, whole):
                    each.keep([1, 0])
                    assert each.start() == [2]
                    model.prefill([PROMPTS[3][:150]], each, rows=[2])


@pytest.mark.usefixtures("short_passes")
def test_transformers_sees_the_same(mixed):
    theirs, ours = mixed
    cache = ours.new_cache(4, CAPACITY)
    want = prefill_logits(theirs, PROMPTS)
    assert_logits_close(ours.prefill(PROMPTS, cache, last=False), want)
    forced = draw_prompts([20] * 4, 90, seed=2)
    for step in range(20):
        got = ours.decode(torch.tensor([row[step] for row in forced]), cache)
    prompts = [prompt + row for prompt, row in zip(PROMPTS, forced, strict=True)]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    assert_logits_close(got, prefill_logits(theirs, prompts)[ends])


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.usefixtures("short_passes")
def test_a_row_goes_back_as_far_as_it_can(kv_bits, windowed, mixed, monkeypatch):
    """What others' tokens or integers have taken the place of is forgotten, and read again."""
    far = 340 if kv_bits == 16 else 0  # integers leave whole runs alone, the last of which is near
    for model, goes_back in (
        (windowed, {384: 384, 340: far, 281: 0, 64: 0}),
        (mixed[1], {384: 384, 281: 0, 1: 0}),
    ):
        monkeypatch.setattr(model, "kv_bits", kv_bits)
        cache = model.new_cache(1, CAPACITY)
        for wanted, left in goes_back.items():
            cache.reset()
            model.prefill([PROMPTS[0]], cache)
            assert cache.rewind(0, 1000) == 390
            assert cache.rewind(0, wanted) == left == cache.lengths[0]
            for end in (400, 330):  # what has been written since does not come back
                prompt = [*PROMPTS[0][:wanted], *PROMPTS[1] * 200][:end]
                start = cache.rewind(0, min(wanted, end - 1))
                got = model.prefill([prompt[start:]], cache)
                assert same(got, model.prefill([prompt], model.new_cache(1, CAPACITY)))


def test_integers_of_a_whole_run_are_no_keys_as_they_came(mixed, monkeypatch):
    """Without a window, too: a run that has been quantized begins anew."""
    model = mixed[1]
    monkeypatch.setattr(model, "kv_bits", 4)
    cache = model.new_cache(1, CAPACITY)
    prompt = PROMPTS[0][:200]
    model.prefill([prompt], cache)
    assert cache.rewind(0, 195) == 195
    assert cache.rewind(0, 100) == 64
    other = [*prompt[:100], *prompt[:50]]
    got = model.prefill([other[64:]], cache)
    assert same(got, model.prefill([other], model.new_cache(1, CAPACITY)))


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.usefixtures("short_passes")
def test_a_row_goes_back_behind_an_interrupted_pass(kv_bits, mixed, windowed, monkeypatch):
    """And after it went back without a token since: what of a later run came is not seen."""

    def interrupt(*_):
        if next(passes):
            raise KeyboardInterrupt

    prompt, other = PROMPTS[0][:100], PROMPTS[2]
    for model in (mixed[1], windowed):
        monkeypatch.setattr(model, "kv_bits", kv_bits)
        for wanted, layer in ((100, 0), (90, 0), (70, 1), (10, 1)):
            cache = model.new_cache(1, CAPACITY)
            model.prefill([prompt], cache)
            passes, hook = count(), model.layers[layer].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.prefill([other[:40]], cache)
            hook.remove()
            for length in (wanted, wanted - 5):
                start = cache.rewind(0, length)
                assert start == length or kv_bits < 16
            text = [*prompt[:start], *other]
            got = model.prefill([text[start:]], cache)
            assert same(got, model.prefill([text], model.new_cache(1, CAPACITY)))


@pytest.mark.usefixtures("short_passes")
def test_a_row_that_begins_anew_goes_back_as_at_first(windowed):
    """Whatever it held before."""
    cache = windowed.new_cache(1, CAPACITY)
    windowed.prefill([PROMPTS[0]], cache)
    assert cache.rewind(0, 100) == 0
    windowed.prefill([PROMPTS[0][:150]], cache)
    assert cache.rewind(0, 140) == 140


def test_a_pass_may_not_write_over_what_it_sees(windowed, monkeypatch):
    monkeypatch.setattr(kv_cache, "PREFILL_TOKENS", PASS)
    cache = windowed.new_cache(1, CAPACITY)
    cache.pass_tokens = 200
    with pytest.raises(IndexError, match=r"^200 tokens in a cache for 192$"):
        windowed.prefill([PROMPTS[0]], cache)
