"""Products of int8 weights or activations by the CPU kernels."""

from __future__ import annotations

import itertools
import math

import exact
import numpy as np
import pytest
import torch
from conftest import examples
from cpu_paths import (
    DTYPES,
    STORED_SCHEMES,
    Int8,
    everywhere,
    normal,
    pattern,
    random_weight,
    same,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st
from product_cases import GROUPS, ROWS, SHAPES, each_type_and_all_bits

from qllm.quant.packing import BITS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.02])
def test_int8_is_the_reference_to_the_bit(scale, dtype):
    scale = None if scale is None else torch.tensor(scale)
    for i, (shape, rows) in enumerate(itertools.product((*SHAPES, (130, 1000)), ROWS)):
        weight = Int8.random(shape, (torch.float16, torch.float32)[i % 2])
        x = normal(rows, shape[1], dtype=dtype, seed=i)
        x[rows // 2] *= 100  # outside of the static range
        if rows > 2:
            x[1] = 0
        weight.assert_exact(x, normal(shape[0], dtype=dtype) if i % 3 else None, scale)


@pytest.mark.parametrize("columns", [1, 31, 128, 1025, 57344])
@pytest.mark.parametrize(("a", "b"), [(-128, -128), (-128, 127), (127, -128), (127, 127)])
def test_int8_at_the_extremes(a, b, columns):
    # 57344: the longest sum of BLOOM-176b. Odd weights of 1 make the sum an odd number.
    q = torch.full((18, columns), b, dtype=torch.int8)
    q[:, 0] = 1
    weight = Int8(q, torch.full((18,), 2.0**-14))
    x = torch.full((3, columns), float(a))
    weight.assert_exact(x, None, torch.tensor(1.0))
    got = everywhere(lambda: weight.kernel(x, None, torch.tensor(1.0)))
    exact = torch.tensor(a * b * (columns - 1) + a, dtype=torch.int32)
    assert got.unique().tolist() == [exact.float().item() * 2.0**-14]
    weight.assert_exact(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_halves_are_rounded_to_even(dtype):
    weight = Int8.random((20, 64))
    x = (torch.arange(-64, 64, dtype=torch.float64) + 0.5).view(2, 64).to(dtype)
    weight.assert_exact(x, None, torch.tensor(1.0))
    weight.assert_exact(x * 2, None, torch.tensor(0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.02])
def test_int8_rows_at_the_edges_of_tiles(scale, dtype):
    scale = None if scale is None else torch.tensor(scale)
    weight, x = Int8.random((40, 100)), normal(1550, 100, dtype=dtype)
    for rows in (*range(1, 51), 191, 192, 193, 1535, 1536, 1537, 1550):
        weight.assert_exact(x[:rows], None, scale)


def _numbers_up_to_each(dtype):
    """Rows (significands, numbers): each significand, and then all from a 512th of it to itself."""
    significands = torch.arange(1, 2, torch.finfo(dtype).eps, dtype=torch.float64)
    numbers = (significands * 2.0 ** -torch.arange(10).view(-1, 1)).flatten()
    top = significands.view(-1, 1)
    return torch.cat([top, torch.where(numbers <= top, numbers, 0)], 1).to(dtype)


# Kernels do not divide these by their steps, and have the integers of a division nevertheless.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_of_every_significand(dtype):
    x = _numbers_up_to_each(dtype)
    Int8.random((2, x.shape[1])).assert_exact(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_activations_of_significands(dtype):
    x = _numbers_up_to_each(dtype)[:: 1 if dtype == torch.bfloat16 else 8]
    top = x[:, :1].unsqueeze(1)
    runs = torch.nn.functional.pad(x[:, 1:], (0, -(x.shape[1] - 1) % 127)).unflatten(1, (-1, 127))
    x = torch.cat([top.expand(-1, runs.shape[1], -1), runs], 2).flatten(0, 1)
    weight = weight_of(np.eye(128, dtype=np.int64) + 8, None, torch.ones(128, 1).half(), 4, -1)
    want = torch.from_numpy(exact.int8_blocks(x, -1))  # which one integer more would miss by far
    error = (weight.everywhere_int8(x).double() - want).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * want.abs()).all()


@examples(100)
@given(data=st.data())
def test_any_int8_product(data):
    outputs, inputs = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 400))
    rows, dtype = data.draw(st.integers(1, 50)), data.draw(st.sampled_from(DTYPES))
    weight = Int8.random((outputs, inputs), data.draw(st.sampled_from(DTYPES[:2])))
    x = normal(rows, inputs, seed=rows)
    x = (x * 2.0 ** data.draw(st.integers(-12, 6))).to(dtype)
    bias = normal(outputs, dtype=dtype) if data.draw(st.booleans()) else None
    scale = data.draw(
        st.one_of(st.none(), st.integers(1, 10000).map(lambda i: torch.tensor(i / 8191)))
    )
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    weight.assert_exact(x, bias, scale)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_int8_activations(bits, dtype):
    # What int8 cannot hold of x is lost; nothing else is but one rounding.
    for i, (group_size, scheme) in enumerate(itertools.product((*GROUPS, 256), STORED_SCHEMES)):
        shape, rows = SHAPES[i % len(SHAPES)], ROWS[i % len(ROWS)]
        weight = random_weight(shape, bits, group_size, scheme)
        x, bias = normal(rows, shape[1], dtype=dtype), normal(shape[0], dtype=dtype)
        got = weight.everywhere_int8(x, bias)
        rounded = torch.from_numpy(exact.int8_blocks(x, group_size))
        want, size = weight.exact(rounded, bias), weight.size(rounded, bias)
        error = (got.double() - want).abs()
        allowed = 2.0**-22 * size + torch.finfo(dtype).eps / 2 * want.abs()
        assert got.dtype == dtype and (error <= allowed).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_sums_of_int8_activations(bits):
    # All inputs become 127 or -127: sums in 16 bits are as full as they get.
    top, scales = 2**bits - 1, torch.ones(20, 1).half() / 128
    for columns, rows in itertools.product((4, 32, 128, 160, 384), (1, 4, 5, 60)):
        signs = torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(columns)
        x = signs.unfold(0, columns, columns // 2)[torch.arange(rows) % 5]
        for q, zero in ((top, 0), (0, top), (top, top // 2)):
            integers, zeros = np.full((20, columns), q), np.full((20, 1), zero)
            weight = weight_of(integers, zeros, scales, bits, -1)
            want = weight.exact(x)
            assert torch.allclose(weight.everywhere_int8(x).double(), want, rtol=2.0**-21, atol=0)


@each_type_and_all_bits
def test_a_row_with_int8_activations_does_not_see_the_others(bits, dtype):
    for outputs, group_size in zip((16, 67, 96, 129), (-1, 20, 32, 128), strict=True):
        weight = random_weight((outputs, 300), bits, group_size)
        x = normal(200, 300, dtype=dtype)
        expected = weight.everywhere_int8(x)
        x[198, 7], x[199, 200] = math.nan, math.inf
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 23, 48, 49, 193):
            assert same(weight.everywhere_int8(x[:rows]), expected[:rows]), rows
        got = weight.everywhere_int8(x)
        assert same(got[:198], expected[:198])
        assert torch.equal(pattern(got[198:]), pattern(weight.exact(x[198:])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_activations_of_huge_numbers_are_left_alone(dtype):
    weight = random_weight((40, 300), 4, 128)
    x = (normal(6, 300) * 2.0 ** torch.tensor([[0, 90, 98, 101, 110, -140]]).t()).to(dtype)
    got = weight.everywhere_int8(x)
    for row in (3, 4):
        assert x[row].abs().max() >= 2.0**100
        assert same(got[row], weight.everywhere(x[row : row + 1])[0])
