"""Products by the CPU kernels, to the bit the same on every path of this machine."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import examples
from covering import pairwise
from cpu_paths import (
    DTYPES,
    STORED_SCHEMES,
    Int8,
    Weight,
    everywhere,
    normal,
    random_weight,
    same,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st
from product_cases import GROUPS, ROWS, SHAPES, assert_close, each_type_and_all_bits

from qllm.config import SCHEMES
from qllm.quant.packing import BITS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_twice_the_reference_s(bits, dtype):
    cases = pairwise(GROUPS, SHAPES, STORED_SCHEMES, (torch.float16, torch.float32))
    for i, (group_size, shape, scheme, scales_dtype) in enumerate(cases):
        weight = random_weight(shape, bits, group_size, scheme, scales_dtype)
        # Each case meets all numbers of rows at some number of bits or another type.
        rows = ROWS[(i + bits + 3 * DTYPES.index(dtype)) % len(ROWS)]
        # Rows may lie apart, as those of a slice do.
        x = normal(rows, shape[1] + 3, dtype=dtype)[:, : shape[1]]
        bias = normal(shape[0], dtype=dtype) if rows % 2 else None
        assert_close(weight, x, bias, weight.everywhere(x, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outlier", [30.0, 1000.0])
def test_the_error_of_a_row_with_an_outlier(outlier, dtype):
    # A block of inputs shares one exponent: the outlier's.
    weight = random_weight((256, 512), 4, 128)
    x = normal(33, 512, dtype=dtype)
    x[:, 5], x[7, 500] = outlier, -outlier
    assert_close(weight, x, None, weight.everywhere(x))


def exact_weight(shape: tuple[int, int], bits: int, group_size: int, scheme: str) -> Weight:
    """A weight whose scales are powers of two, so that sums of integers stay exact."""
    weight = random_weight(shape, bits, group_size, scheme)
    powers = np.random.default_rng(0).integers(-3, 1, tuple(weight.stored.scales.shape))
    scales = torch.from_numpy(np.exp2(powers)).half()
    columns = np.arange(shape[1]) // (shape[1] if group_size == -1 else group_size)
    ratio = scales.double() / weight.stored.scales.double()
    matrix = weight.matrix * ratio[:, columns]
    return Weight(weight.request, weight.stored._replace(scales=scales), matrix.mul(8).round() / 8)


@each_type_and_all_bits
def test_integers_times_powers_of_two_are_exact(bits, dtype):
    cases = itertools.product((-1, 16, 20, 128), SCHEMES, (1, 4, 17, 40), ((70, 200), (16, 33)))
    for i, (group_size, scheme, rows, shape) in enumerate(cases):
        weight = exact_weight(shape, bits, group_size, scheme)
        random = np.random.default_rng(i)
        x = torch.from_numpy(random.integers(-8, 9, (rows, shape[1]))).to(dtype)
        bias = torch.from_numpy(random.integers(-8, 9, shape[0])).to(dtype)
        got = weight.everywhere(x, bias)
        assert torch.equal(got, weight.exact(x, bias).to(dtype))


# The largest value of a block, in units of its smallest step: up to 127 in each of two or four
# planes of 8 bits it is that step, one number of the type further on it is twice that.
LARGEST = {
    torch.float16: (32624.0, 32640.0),
    torch.bfloat16: (32512.0, 32640.0),
    torch.float32: (float(0x7F7F7F00), float(0x7F7F7F80)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_values_beside_the_largest_that_keeps_them(dtype):
    # The largest has weight zero, so that what is left of the small ones is the result.
    q = np.random.default_rng(0).integers(0, 16, (40, 60))
    q[:, [3, 50]] = 8
    weight = weight_of(q, None, torch.ones(40, 2).half(), 4, 32)
    small = torch.arange(-30, 30).expand(7, 60).to(dtype)
    for sign, unit in itertools.product((-1, 1), (2.0**-24, 2.0**-9, 1.0)):
        for largest, step in zip(LARGEST[dtype], (1, 2), strict=True):
            x = small * step
            x[:, 3] = x[:, 50] = sign * largest
            if (x[0, 3] * unit).isfinite() and (x * unit / unit == x).all():
                got = weight.everywhere(x * unit)
                assert torch.equal(got, (weight.exact(x) * unit).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_largest_sums_do_not_overflow(bits, dtype):
    # A block of 128 inputs that are all the largest, times weights that are: and zeros that are.
    top = 2**bits - 1
    for value in (LARGEST[dtype][0], 32768.0 * (1 - torch.finfo(dtype).eps), -LARGEST[dtype][0]):
        for columns, rows in ((128, 60), (160, 8), (384, 5)):
            x = torch.full((rows, columns), value * 2.0**-15).to(dtype)
            for q, zero in ((top, 0), (0, top), (top, top // 2)):
                integers, zeros = np.full((20, columns), q), np.full((20, 1), zero)
                weight = weight_of(integers, zeros, torch.ones(20, 1).half() / 128, bits, -1)
                got = weight.everywhere(x).double()
                close = torch.allclose(got, weight.exact(x), rtol=torch.finfo(dtype).eps, atol=0)
                assert close, (value, columns, q, zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_how_many_there_are(dtype):
    # Tiles are of up to 8 or 12 rows, few rows are 24 or 48; activations are held for 1536 rows,
    # their sums for 192.
    weight = random_weight((40, 100), 4, 32)
    x, bias = normal(1550, 100, dtype=dtype), normal(40, dtype=dtype)
    expected = weight.everywhere(x, bias)
    for rows in (*range(1, 51), 191, 192, 193, 194, 384, 385, 1535, 1536, 1537):
        for first in {0, 3, 1550 - rows}:
            if first + rows <= 1550 and (rows < 400 or first == 0):
                part = slice(first, first + rows)
                assert same(weight.everywhere(x[part], bias), expected[part]), (rows, first)


@each_type_and_all_bits
def test_a_row_of_few_is_a_row_of_many(bits, dtype):
    # 1 to 9 panels: those that are left over where several are read at once.
    for outputs, group_size in zip(
        (16, 23, 48, 64, 67, 96, 110, 128, 129), GROUPS * 2, strict=False
    ):
        weight = random_weight((outputs, 150), bits, group_size)
        x = normal(64, 150, dtype=dtype)
        expected = weight.everywhere(x)
        for rows in (1, 2, 3, 4, 5, 6, 8, 15, 16, 17, 24, 25, 48, 49):
            assert same(weight.everywhere(x[:rows]), expected[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_see_the_others(dtype):
    weight = random_weight((40, 300), 5, 100)
    x = normal(40, 300, dtype=dtype)
    expected = weight.everywhere(x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert same(weight.everywhere(x[order]), expected[order])
    others = x * 1000
    others[::3, 7], others[1::3, 200] = math.nan, math.inf
    for kept in ([0], [39], [5, 6, 20], range(0, 40, 2)):
        mixed = others.clone()
        mixed[list(kept)] = x[list(kept)]
        assert same(weight.everywhere(mixed)[list(kept)], expected[list(kept)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_threads(dtype):
    scale = torch.tensor(0.02)
    for outputs in (5, 40, 150, 300):
        weight, integers = random_weight((outputs, 70), 3, 20), Int8.random((outputs, 70))
        for rows in (1, 2, 5, 9, 16, 17, 40, 200):
            x = normal(rows, 70, dtype=dtype)
            calls = (
                lambda w=weight, x=x: w.everywhere(x),
                lambda w=integers, x=x: everywhere(lambda: w.kernel(x)),
                lambda w=integers, x=x: everywhere(lambda: w.kernel(x, None, scale)),
            )
            for call in calls:
                torch.set_num_threads(1)
                expected = call()
                for threads in (2, 3):
                    torch.set_num_threads(threads)
                    assert same(call(), expected)


@examples(100)
@given(data=st.data())
def test_any_product(data):
    outputs, inputs = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 400))
    rows, dtype = data.draw(st.integers(1, 50)), data.draw(st.sampled_from(DTYPES))
    weight = random_weight(
        (outputs, inputs),
        data.draw(st.sampled_from(BITS)),
        data.draw(st.one_of(st.just(-1), st.integers(16, 420))),
        data.draw(st.sampled_from(SCHEMES)),
        data.draw(st.sampled_from([torch.float16, torch.float32])),
        data.draw(st.integers(0, 1000)),
    )
    x = normal(rows, inputs, seed=rows)
    x = (x * 2.0 ** data.draw(st.integers(-12, 6))).to(dtype)
    bias = normal(outputs, dtype=dtype) if data.draw(st.booleans()) else None
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    got = weight.everywhere(x, bias)
    assert_close(weight, x, bias, got)
    some = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20))
    assert same(weight.everywhere(x[some], bias), got[some])
