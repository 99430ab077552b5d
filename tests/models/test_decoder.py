"""The decoder against transformers: random models of each family, the bundled ones, half types."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, examples
from covering import each, slow_but
from hypothesis import assume, given
from oracle import (
    LOGITS_TOLERANCE,
    assert_logits_close,
    assert_same_model,
    bundled,
    decode_logits,
    draw_prompts,
    load,
    our_bundled,
    prefill_logits,
    random_model,
    save,
)
from random_configs import CONFIGS, batches, seeds
from random_hybrids import HYBRIDS
from random_sizes import MAX_NEW_TOKENS
from torch import Tensor, nn
from transformers import BloomConfig, LlamaConfig, OPTConfig, PretrainedConfig

from qllm.errors import UserError
from qllm.models import FAMILIES as MODEL_FAMILIES
from qllm.models import Decoder
from qllm.models.cache import KVCache
from qllm.models.logits import finish_logits
from qllm.models.passes import Decode, Prefill
from qllm.ops import phase
from qllm.ops.capture import EagerStep

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = (torch.float16, torch.bfloat16)
# Of a delta rule whose keys, of random weights, come from next to nothing: transformers in float32
# is as far from itself in float64.
RECURRENT_TOLERANCE = 2e-4


def prefill_step(model: Decoder, x: Tensor) -> Prefill:
    """One of a text of as many tokens as x has rows."""
    return Prefill([len(x)], None, model.positions, x)


def check_random_model(config: PretrainedConfig, lengths: list[int], seed: int) -> None:
    assume(config.model_type != "phi3" or min(lengths) > 1)  # see phi3_configs
    theirs = random_model(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        ours = save(theirs, Path(folder))
    prompts = draw_prompts(lengths, config.vocab_size, seed)
    tolerance = RECURRENT_TOLERANCE if config.model_type in HYBRIDS else LOGITS_TOLERANCE
    assert_same_model(ours, theirs, prompts, MAX_NEW_TOKENS, tolerance)


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_random_models(family):
    configs, count = CONFIGS[family]

    @examples(count)
    @given(configs, batches, seeds)
    def check(config, lengths, seed):
        check_random_model(config, lengths, seed)

    check()


# What is particular about released models, in small.
OPT_SIZES = {"vocab_size": 90, "num_hidden_layers": 3, "ffn_dim": 64, "max_position_embeddings": 40}
LLAMA_SIZES = {"vocab_size": 90, "num_hidden_layers": 3, "intermediate_size": 56}
RELEASED = {
    "opt-125m": OPTConfig(**OPT_SIZES, hidden_size=48, num_attention_heads=12),
    "opt-350m": OPTConfig(
        **OPT_SIZES,
        hidden_size=64,
        num_attention_heads=16,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
    ),
    "opt before transformers 4.20": OPTConfig(
        **OPT_SIZES, hidden_size=32, num_attention_heads=4, _remove_final_layer_norm=True
    ),
    "galactica": OPTConfig(
        **OPT_SIZES,
        hidden_size=32,
        num_attention_heads=4,
        activation_function="gelu",
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    ),
    "bloom-560m": BloomConfig(vocab_size=90, hidden_size=64, n_head=16, n_layer=3),
    "bloom-176b": BloomConfig(vocab_size=90, hidden_size=112, n_head=28, n_layer=3),
    "llama-7b": LlamaConfig(**LLAMA_SIZES, hidden_size=32, num_attention_heads=4),
    "llama-3.2-1b": LlamaConfig(
        **LLAMA_SIZES,
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        tie_word_embeddings=True,
    ),
}
MIXED = [20, 1, 7, 7, 13, 2, 19, 3]


@pytest.mark.parametrize("name", RELEASED)
def test_models_as_released(name, tmp_path):
    theirs = random_model(RELEASED[name])
    ours = save(theirs, tmp_path)
    want = assert_same_model(ours, theirs, draw_prompts(MIXED, 90), 16)
    # Rows that all say the same would not show a row that reads another's cache.
    assert len(set(map(tuple, want.tokens))) > 4


def test_opt_350m_has_its_oddities(tmp_path):
    ours = save(random_model(RELEASED["opt-350m"]), tmp_path)
    assert not ours.config.pre_norm
    assert isinstance(ours.final_norm, nn.Identity)
    assert ours.embed.weight.shape == (90, 32)
    assert ours.project_in.weight.shape == (64, 32)
    assert ours.project_out.weight.shape == (32, 64)
    assert ours.lm_head.weight.data_ptr() == ours.embed.weight.data_ptr()


def test_unknown_activation_is_refused(tmp_path):
    config = OPTConfig(**OPT_SIZES, hidden_size=32, num_attention_heads=4)
    random_model(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"relu"', '"snake"'))
    with pytest.raises(UserError, match="'snake' is unknown; known: relu, gelu"):
        load(tmp_path)


TEXT_LENGTHS = [5, 1, 33, 12, 60, 2, 20, 7, 41]


@pytest.mark.parametrize("family", FAMILIES)
def test_bundled_model_equals_transformers(family):
    prompts = draw_prompts(TEXT_LENGTHS, 4096, seed=1)
    assert_same_model(our_bundled(family), bundled(family), prompts, 12)


@pytest.mark.parametrize(("family",), slow_but([("bloom",)], FAMILIES))
def test_long_prompt(family):
    prompts = draw_prompts([400, 3], 4096, seed=2)
    assert_same_model(our_bundled(family), bundled(family), prompts, 8)


@pytest.mark.covering(1)
@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_one(family, length):
    prompts = draw_prompts([length], 4096, seed=3)
    assert_same_model(our_bundled(family), bundled(family), prompts, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_its_single_prompts(family):
    model = our_bundled(family)
    prompts = draw_prompts(TEXT_LENGTHS, 4096, seed=4)
    forced = torch.tensor(draw_prompts([6] * len(prompts), 4096, seed=5))
    together = decode_logits(model, prompts, forced)
    for row, prompt in enumerate(prompts):
        alone = decode_logits(model, [prompt], forced[row : row + 1])
        assert_logits_close(together[:, row : row + 1], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_see_nothing_but_their_own_tokens(family):
    """Not what the cache held before, not its free places, not another row's NaN."""
    model = our_bundled(family)
    prompts = draw_prompts([3, 9, 5], 4096)
    forced = torch.tensor(draw_prompts([4] * 3, 4096))
    clean = decode_logits(model, prompts, forced)
    cache = model.new_cache(3, 64)
    for tensor in chain(*cache.layers):
        tensor.fill_(1e4)
    got = [model.prefill(prompts, cache)]
    for tensor in chain(*cache.layers):
        tensor[1] = torch.nan
    got += [model.decode(forced[:, step], cache) for step in range(3)]
    got = torch.stack(got)
    assert got[1:, 1].isnan().all()
    assert_logits_close(got[:, ::2], clean[:, ::2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_moves_on_by_itself_finds_the_same(family, monkeypatch):
    """As a graph does: rows and positions are written where they are not what it came to alone."""
    model, prompts = our_bundled(family), draw_prompts([3, 9, 5], 4096)
    forced = torch.tensor(draw_prompts([8] * 3, 4096))

    def run() -> list[Tensor]:
        cache, found = model.new_cache(3, 32), []
        model.prefill(prompts, cache)
        for number in range(6):
            if number == 3:
                cache.keep([0, 2])
            found.append(model.decode(forced[cache.live, number], cache))
        cache.lengths[2] -= 2  # as what is taken back
        return [*found, model.decode(forced[cache.live, 7], cache)]

    def begin(step: Decode, *given: object) -> None:
        create(step, *given)
        step._moves_on, step._looks_up_itself = True, None not in step.tables

    def eager(run: Callable[[], None], *_: object, no_graph: str | None) -> EagerStep:
        run()
        return EagerStep(run, "")

    expected, create = run(), Decode.__init__
    monkeypatch.setattr(Decode, "__init__", begin)
    monkeypatch.setattr("qllm.models.decoder.capture", eager)
    written, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda *given, **how: written.append(given[0]) or copy(*given, **how)
    )
    found = run()
    for got, want in zip(found, expected, strict=True):
        assert_logits_close(got, want)
    # At first, where there are fewer rows, and behind what was taken back.
    assert sum(part.dim() == 2 and part.dtype == torch.int64 for part in written) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_hidden_states_and_the_head(family):
    model, prompts = our_bundled(family), draw_prompts([5, 9], 4096)
    hidden = model.hidden(prompts)
    assert torch.equal(model.prefill(prompts, last=False), model.logits(hidden))
    with phase.decode():  # as the head of last tokens is run
        last = model.logits(hidden[[4, 13]])
    assert torch.equal(model.prefill(prompts), last)
    cache = model.new_cache(2, 9)
    model.hidden(prompts, cache)
    assert cache.lengths == [5, 9]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_factors_round_as_in_transformers(dtype, sources):
    """Granite's multiply as they are, Gemma's factor of embeddings as its type has it."""
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    granite, gemma = (load(sources(name), dtype=dtype) for name in ("granite", "gemma2"))
    config, layer = granite.config, granite.layers[0]
    step, normed = prefill_step(granite, x), layer.attention_norm(x)
    plain = layer.attention(normed, step)
    assert torch.equal(layer._attended(normed, step), plain * 0.22)
    assert torch.equal(layer._through_mlp(normed), layer.mlp(normed) * 0.22)
    assert torch.equal(granite.embed_scale(x), x * 3.0)
    assert torch.equal(gemma.embed_scale(x), x * torch.tensor(48**0.5, dtype=dtype))
    assert torch.equal(finish_logits(config, x, torch.float32), (x / 1.7).float())


@pytest.mark.parametrize(
    ("family", "dtype"), slow_but(each(FAMILIES, HALVES), FAMILIES, HALVES), ids=str
)
def test_half_precision_is_as_good_as_transformers(family, dtype):
    """By the error against float32: half types round at different places in the two."""
    prompts = draw_prompts([5, 1, 33, 12], 4096, seed=6)
    exact = prefill_logits(bundled(family), prompts)
    theirs = prefill_logits(bundled(family, dtype), prompts)
    model = our_bundled(family, dtype=dtype)
    ours = model.prefill(prompts, last=False)
    assert model.dtype == model.new_cache(1, 1).layers[0].keys.dtype == dtype
    assert ours.dtype == torch.float32
    error, allowed = (ours - exact).square().mean().sqrt(), (theirs - exact).square().mean().sqrt()
    assert 0 < error < 1.5 * allowed
    forced = torch.tensor(draw_prompts([5] * len(prompts), 4096))
    decoded = decode_logits(model, prompts, forced)
    whole = [p + row[:4].tolist() for p, row in zip(prompts, forced, strict=True)]
    ends = torch.tensor([len(p) for p in whole]).cumsum(0) - 1
    exact = prefill_logits(bundled(family), whole)[ends]
    assert (decoded[-1] - exact).square().mean().sqrt() < 2 * allowed


def test_cache_size_is_what_a_cache_takes():
    for family in FAMILIES:
        model = our_bundled(family)
        cache = model.new_cache(3, 11)
        size = sum(tensor.nbytes for tensor in chain(*cache.layers))
        assert sum(KVCache.sizes(model.config, 3, 11, torch.float32)) == size
