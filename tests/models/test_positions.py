"""Position encodings as transformers has them: ALiBi's slopes and biases, RoPE's frequencies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import oracle  # noqa: F401 - silences transformers
import pytest
import torch
from conftest import examples, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from qllm.errors import UserError
from qllm.models import RawConfig, read_config
from qllm.models.positions import (
    POSITIONS,
    AlibiPositions,
    LearnedPositions,
    PositionEncoding,
    RotaryPositions,
    alibi_slopes,
)
from qllm.ops import KERNELS, Request
from qllm.ops.kv import KV, Batch
from qllm.ops.reference import rotate


def our_config(family: str, **changes):
    """The bundled model's config with some values changed; None takes one out."""
    values = json.loads((tiny(family) / "config.json").read_text()) | changes
    values = {key: value for key, value in values.items() if value is not None}
    return read_config(RawConfig(values, "config.json"))


@pytest.mark.parametrize("heads", [*range(1, 41), 48, 56, 64, 96, 112, 128])
def test_alibi_slopes(heads):
    # The bias of the second of two tokens is one slope.
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def kernels(op: str) -> list[Callable]:
    """All of an op that run here."""
    request = Request(0, 0, 16, -1, "asym", "cpu")
    return [kernel.run for kernel in KERNELS[op] if kernel.unsupported_reason(request) is None]


def prompt_weights(
    run: Callable,
    heads: int,
    length: int,
    slopes: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each query of a prompt takes of each value, when all keys are alike: (T, H, T)."""
    qkv = torch.zeros(length, heads + 2, length)
    qkv[:, -1] = torch.eye(length)
    kv = KV(*torch.full((2, 1, 1, length + 3, length), 1e4, dtype=dtype))
    out = run(qkv.flatten(1).to(dtype), kv, Batch.of([length], "cpu"), None, slopes)
    return out.view(length, heads, length)


def token_weights(run: Callable, heads: int, positions: list[int], slopes: Tensor | None) -> Tensor:
    """The same of one new token per row: (B, H, capacity); what lies behind it must not matter."""
    capacity = max(positions) + 3
    qkv = torch.zeros(len(positions), heads + 2, capacity)
    keys, values = torch.full((2, len(positions), 1, capacity, capacity), 1e4)
    for row, position in enumerate(positions):
        keys[row, :, :position] = 0
        values[row, 0, :position] = torch.eye(capacity)[:position]
        qkv[row, -1, position] = 1
    batch = Batch.of([1] * len(positions), "cpu", pasts=positions)
    out = run(qkv.flatten(1), KV(keys, values), batch, None, slopes)
    return out.view(len(positions), heads, capacity)


@examples(50)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 12))
def test_alibi_biases_are_transformers_up_to_a_constant_per_query(lengths, heads):
    """Left-padded rows of transformers, each cut out of the batch; softmax sees no constant."""
    config = our_config("bloom", n_head=heads, hidden_size=4 * heads)
    slopes = AlibiPositions(config, torch.float32).slopes
    longest = max(lengths)
    attention = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    theirs = build_alibi_tensor(attention, heads, torch.float32).view(len(lengths), heads, longest)

    def weights(bias: Tensor, size: int) -> Tensor:
        """Of the keys with these biases (…, n), and of others up to `size`, which have none."""
        return F.pad(bias.softmax(-1), (0, size - bias.shape[-1]))

    for attend in kernels("decode_attention"):
        last = token_weights(attend, heads, [n - 1 for n in lengths], slopes)
        for row, n in enumerate(lengths):
            want = weights(theirs[row, :, longest - n :], longest + 2)
            torch.testing.assert_close(last[row], want, rtol=1e-5, atol=0)
    for attend in kernels("prefill_attention"):
        for row, n in enumerate(lengths):
            bias = theirs[row, :, longest - n :]
            want = torch.stack([weights(bias[:, : query + 1], n) for query in range(n)])
            got = prompt_weights(attend, heads, n, slopes)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_without_slopes_all_tokens_so_far_weigh_the_same():
    assert PositionEncoding.slopes is None
    for attend in kernels("prefill_attention"):
        want = torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None]
        torch.testing.assert_close(prompt_weights(attend, 1, 5, None)[:, 0], want)
    for attend in kernels("decode_attention"):
        want = torch.zeros(3, 1, 6)
        want[0, 0, :1], want[1, 0, :4], want[2, 0, :2] = 1, 1 / 4, 1 / 2
        torch.testing.assert_close(token_weights(attend, 1, [0, 3, 1], None), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosines_have_the_type_of_the_activations(dtype):
    encoding = RotaryPositions(our_config("llama"), dtype)
    exact = encoding.cos_sin(torch.arange(3), [3], torch.float32)
    for part, want in zip(encoding.cos_sin(torch.arange(3), [3], dtype), exact, strict=True):
        assert part.shape == (3, 32)
        assert torch.equal(part, want.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_are_not_rounded_to_the_type_of_the_activations(dtype):
    """Nor is the result of another type."""
    slopes = alibi_slopes(4)
    for attend in kernels("prefill_attention"):
        got, want = (prompt_weights(attend, 4, 9, slopes, t) for t in (dtype, torch.float32))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_learned_positions_start_at_the_third_row():
    encoding = LearnedPositions(our_config("opt", max_position_embeddings=5), torch.float32)
    assert encoding.weight.shape == (7, 256)
    encoding.weight = torch.arange(7.0)[:, None].expand(7, 256)
    x = torch.full((3, 256), 100.0)
    assert encoding.embed(x, torch.tensor([0, 4, 1]))[:, 0].tolist() == [102, 106, 103]


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_each_family_has_one_encoding(family):
    encoding = POSITIONS[our_config(family).position](our_config(family), torch.float32)
    if family == "opt":
        encoding.weight = torch.ones(encoding.weight.shape)
    x = torch.zeros(3, 256)
    assert encoding.embed(x, torch.arange(3)).any() == (family == "opt")
    assert (encoding.slopes is not None) == (family == "bloom")
    turns = encoding.cos_sin(torch.tensor([5, 6, 7]), [8], torch.float32) is not None
    assert turns == (family == "llama")


ropes = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1, 16)}),
    st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": st.floats(1, 16)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 32),
            "low_freq_factor": st.floats(0.25, 2),
            "high_freq_factor": st.floats(2.5, 8),
            "original_max_position_embeddings": st.integers(8, 8192),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": st.floats(0.5, 32),
            "original_max_position_embeddings": st.integers(2, 8192),
            "beta_fast": st.floats(1, 64),
            "beta_slow": st.floats(0.1, 4),
            "mscale": st.one_of(st.none(), st.floats(0.1, 2)),
            "mscale_all_dim": st.one_of(st.none(), st.floats(0.1, 2)),
            "truncate": st.one_of(st.none(), st.booleans()),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("proportional"),
            "factor": st.floats(1, 16),
            "partial_rotary_factor": st.floats(0.05, 1),
        }
    ),
)


@given(
    rope=ropes,
    theta=st.floats(100, 1e6),
    half=st.integers(2, 64),
    trained=st.integers(8, 4096),
    longest=st.integers(1, 9000),
)
def test_rope_frequencies(rope, theta, half, trained, longest):
    rope = {**rope, "rope_theta": theta}
    sizes = {"head_dim": 2 * half, "max_position_embeddings": trained}
    theirs = LlamaConfig(**sizes, rope_parameters=dict(rope))
    encoding = RotaryPositions(our_config("llama", **sizes, rope_parameters=rope), torch.float32)
    if rope["rope_type"] == "default":
        want, scaling = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        find = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        want, scaling = find(theirs, device="cpu", seq_len=longest)
    assert encoding.config.rope.attention_factor == pytest.approx(scaling)
    got = encoding.frequencies(longest)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@given(positions=st.lists(st.integers(0, 4000), min_size=1, max_size=5))
def test_rope_turns_as_transformers_does(positions):
    config = our_config("llama")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(positions), n, 32, generator=generator) for n in (8, 4))
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(head_dim=32))(q, torch.tensor([positions]))
    want = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    encoding = RotaryPositions(config, torch.float32)
    angles = encoding.cos_sin(torch.tensor(positions), [max(positions) + 1], torch.float32)
    assert angles[0].shape == angles[1].shape == (len(positions), 32)
    torch.testing.assert_close(rotate(q, angles), want[0][0])
    torch.testing.assert_close(rotate(k, angles), want[1][0])


@pytest.mark.parametrize(
    ("rope", "window"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 2.5}, 1280),
        ({"rope_type": "dynamic", "factor": 4.0}, 2048),
        ({"rope_type": "proportional", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "longrope", "short_factor": [1] * 16, "long_factor": [2] * 16}, 512),
    ],
)
def test_scaling_widens_the_window(rope, window):
    assert our_config("llama", rope_parameters=rope).max_positions == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "mrope", "factor": 2.0}}, "rope_type is 'mrope'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is missing"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}},
            "beta_fast is -1",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 15}},
            "short_factor is .*; expected a list of 16 positive numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 15 + ["x"]}},
            "short_factor is 'x'",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": -1}}, "factor is -1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "expected a positive number"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rope_parameters": ["linear"]}, "rope_parameters is .*; expected an object"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "partial_rotary_factor is 0.5; expected 1 with rope_type 'linear'",
        ),
        ({"head_dim": 7}, "even head_dim, not 7"),
        (
            {"head_dim": 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "head_dim of 4 or more",
        ),
        ({"num_key_value_heads": 3}, "8 heads cannot share 3 key-value heads"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        our_config("llama", **changes)
