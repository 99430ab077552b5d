"""Round-to-nearest against DESIGN §3 in numpy float64, and its error bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qllm.config import SCHEMES
from qllm.quant import rtn
from qllm.quant.packing import BITS, packed_size, unpack
from qllm.quant.rtn import quantize_rtn

GROUP_SIZES = (-1, 1, 7, 32, 128)
HALF = 2.0**-11  # half a unit in the last place of float16, relative


def gaussian(*shape: int, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(shape) * scale
    return drawn.astype(np.float32)


def groups_of(columns: int, group_size: int) -> list[slice]:
    step = columns if group_size == -1 else group_size
    return [slice(start, min(start + step, columns)) for start in range(0, columns, step)]


def exact_scale(group: np.ndarray, bits: int, scheme: str) -> np.ndarray:
    """The scale of each row of a group (N, g), float64, before it is stored."""
    if scheme == "sym":
        scale = 2 * np.abs(group).max(axis=1) / (2**bits - 1)
    else:
        scale = (np.maximum(group.max(axis=1), 0) - np.minimum(group.min(axis=1), 0)) / (
            2**bits - 1
        )
    return np.where(scale == 0, 1.0, scale)


def rounded(exact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """round(exact), and where float32 may take the other neighbour: within its error of a tie."""
    to_tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5)
    return np.rint(exact), to_tie <= 1e-6 * np.maximum(np.abs(exact), 1)


def check_against_design(weight: np.ndarray, bits: int, group_size: int, scheme: str) -> None:
    """Hold the result for a weight (N, K) to DESIGN §3, group by group."""
    tensor = torch.from_numpy(weight)
    packed, scales, zeros, *_ = quantize_rtn(tensor, bits, group_size, scheme)
    rows, columns = weight.shape
    groups = groups_of(columns, group_size)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_size(columns, bits))
    assert scales.shape == (rows, len(groups))
    assert zeros.dtype == torch.uint8
    assert zeros.shape == ((rows, len(groups)) if scheme == "asym" else (0,))
    q = unpack(packed, bits, columns).numpy().astype(np.int64)
    stored_scales = scales.double().numpy()
    top = 2**bits - 1
    loose = 0
    for index, part in enumerate(groups):
        group, scale = weight[:, part].astype(np.float64), stored_scales[:, index]
        exact = exact_scale(group, bits, scheme)
        allowed = HALF * exact if scales.dtype == torch.float16 else 2.0**-22 * exact
        allowed = np.maximum(allowed, 2.0**-25)  # float16's smallest numbers are this far apart
        assert (np.abs(scale - exact) <= allowed * (1 + 1e-3)).all()
        # From here on the scale is the one that was stored.
        zero = np.full(rows, 2 ** (bits - 1))
        if scheme == "asym":
            zero, tied = rounded(-np.minimum(group.min(axis=1), 0) / scale)
            zero = np.clip(zero, 0, top)
            got = zeros[:, index].numpy()
            assert ((got == zero) | tied).all()
            zero = np.where(tied, got, zero)
        steps, tied = rounded(group / scale[:, None])
        expected = np.clip(steps + zero[:, None], 0, top)
        difference = np.abs(q[:, part] - expected)
        assert (difference[~tied] == 0).all()
        assert (difference[tied] <= 1).all()
        if scheme == "sym":  # the largest weight stands half a step from either end, always
            tied &= np.abs(group) < np.abs(group).max(axis=1, keepdims=True)
        loose += tied.sum()
    assert loose <= 2 + weight.size // 100


@pytest.mark.covering(2)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_against_float64(bits, group_size, scheme):
    # 131 is prime: every group size but 1 leaves a last, shorter group.
    check_against_design(gaussian(5, 131, seed=bits), bits, group_size, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("columns", [1, 2, 7, 31, 32, 64, 127])
def test_shapes_smaller_than_a_group(columns, scheme):
    check_against_design(gaussian(3, columns), 4, 128, scheme)
    check_against_design(gaussian(1, columns), 3, 5, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_groups_of_one_sign(shift, scheme):
    # The range still has 0 in it: all weights on one side of it use the rest.
    check_against_design(np.abs(gaussian(4, 40)) * shift, 4, 8, scheme)


def test_asymmetric_by_hand():
    # lo = -2, hi = 5.5, scale = 7.5 / 15 = 0.5, zero = 4; 0.25 and 0.75 tie to the even step.
    weight = torch.tensor([[-2.0, 5.5, 0.0, 0.25, 0.75, 1.0]])
    packed, scales, zeros, *_ = quantize_rtn(weight, 4, -1, "asym")
    assert scales.tolist() == [[0.5]] and scales.dtype == torch.float16
    assert zeros.tolist() == [[4]]
    assert unpack(packed, 4, 6).tolist() == [[0, 15, 4, 4, 6, 6]]


def test_symmetric_by_hand():
    # scale = 2 · 7.5 / 15 = 1, zero = 8; 7.5 rounds to 8 and is cut off at 15 - 8.
    weight = torch.tensor([[-7.5, 7.5, 0.0, 2.4, -3.0]])
    packed, scales, zeros, *_ = quantize_rtn(weight, 4, -1, "sym")
    assert scales.tolist() == [[1.0]]
    assert zeros.numel() == 0
    assert unpack(packed, 4, 5).tolist() == [[0, 15, 8, 10, 5]]


def test_last_group_is_one_of_its_own():
    # The last group's one weight would vanish on the grid of those before it.
    weight = torch.tensor([[1024.0, 0.0, -1024.0, 0.25]])
    packed, scales, zeros, *_ = quantize_rtn(weight, 2, 3, "asym")
    assert scales.tolist() == [[682.5, float(np.float16(0.25 / 3))]]
    assert zeros.tolist() == [[2, 0]]
    assert unpack(packed, 2, 4).tolist() == [[3, 2, 0, 3]]


def test_integers_come_of_the_scale_as_stored():
    # float16 holds 1/15 as 0.066650: 0.9665 / 0.066650 is 14.501, while 0.9665 · 15 is 14.498.
    weight = torch.tensor([[1.0, 0.9665]])
    packed, scales, *_ = quantize_rtn(weight, 4, -1, "asym")
    assert scales.tolist() == [[0.066650390625]]
    assert unpack(packed, 4, 2).tolist() == [[15, 15]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_have_scale_one(bits, scheme):
    weight = torch.zeros(2, 12)
    weight[1, :4] = 1.0
    packed, scales, zeros, *_ = quantize_rtn(weight, bits, 4, scheme)
    assert scales[0].tolist() == [1.0] * 3 and scales[1, 1:].tolist() == [1.0] * 2
    zero = 0 if scheme == "asym" else 2 ** (bits - 1)
    assert unpack(packed, bits, 12)[0].tolist() == [zero] * 12
    if scheme == "asym":
        assert zeros.tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (1e8, torch.float32),  # a scale above 65504
        (1e-6, torch.float32),  # a scale that would be a float16 subnormal, or 0
        (1e-30, torch.float32),
        (1.0, torch.float16),
        (0.01, torch.float16),
    ],
)
def test_scales_float16_cannot_hold_are_float32(size, dtype, scheme):
    weight = gaussian(3, 40, scale=size)
    assert quantize_rtn(torch.from_numpy(weight), 4, 8, scheme)[1].dtype == dtype
    check_against_design(weight, 4, 8, scheme)


def test_one_scale_decides_for_the_matrix():
    weight = torch.ones(4, 16)
    weight[3, 8:] = 1e-9
    scales = quantize_rtn(weight, 4, 8, "asym")[1]
    assert scales.dtype == torch.float32
    assert torch.allclose(scales[3], torch.tensor([1 / 15, 1e-9 / 15]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_narrow_weight_is_quantized_as_the_same_numbers_in_float32(scheme, dtype):
    weight = torch.from_numpy(gaussian(5, 67)).to(dtype)
    for got, expected in zip(
        quantize_rtn(weight, 4, 16, scheme)[:3],
        quantize_rtn(weight.float(), 4, 16, scheme)[:3],
        strict=True,
    ):
        assert torch.equal(got, expected) and got.dtype == expected.dtype


@pytest.mark.parametrize("chunk", [1, 100, 500])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_size_of_a_piece_does_not_show(monkeypatch, scheme, chunk):
    weight = torch.from_numpy(gaussian(11, 67))
    whole = quantize_rtn(weight, 3, 16, scheme)
    monkeypatch.setattr(rtn, "CHUNK_ELEMENTS", chunk)
    for got, expected in zip(quantize_rtn(weight, 3, 16, scheme)[:3], whole[:3], strict=True):
        assert torch.equal(got, expected)


def test_the_weight_is_left_as_it_was():
    weight = torch.from_numpy(gaussian(3, 33))
    before = weight.clone()
    quantize_rtn(weight, 4, 8, "asym")
    assert torch.equal(weight, before)


@given(
    bits=st.sampled_from(BITS),
    scheme=st.sampled_from(SCHEMES),
    group_size=st.sampled_from([-1, 1, 3, 8, 64]),
    columns=st.integers(1, 40),
    exponent=st.integers(-24, 24),
    seed=st.integers(0, 2**32 - 1),
)
def test_error_is_at_most_half_a_step(bits, scheme, group_size, columns, exponent, seed):
    # Student's t with 2 degrees of freedom: outliers, as trained weights have.
    drawn = np.random.default_rng(seed).standard_t(2, (2, columns)) * 2.0**exponent
    weight = drawn.astype(np.float32)
    packed, scales, zeros, *_ = quantize_rtn(torch.from_numpy(weight), bits, group_size, scheme)
    q = unpack(packed, bits, columns).numpy().astype(np.float64)
    for index, part in enumerate(groups_of(columns, group_size)):
        group, scale = weight[:, part].astype(np.float64), scales[:, index].double().numpy()
        zero = zeros[:, index].numpy() if scheme == "asym" else np.full(2, 2 ** (bits - 1))
        error = np.abs((q[:, part] - zero[:, None]) * scale[:, None] - group)
        # Half a step; a scale that was rounded down to be stored moves the ends of the grid in.
        clamped = (2**bits - 1) * np.abs(scale - exact_scale(group, bits, scheme))
        assert (error <= (scale / 2 + clamped)[:, None] * (1 + 1e-5)).all()
