"""The products of the CPU kernels, to the bit the same on every path of this machine."""

from __future__ import annotations

import itertools
import math

import exact
import numpy as np
import pytest
import torch
from conftest import examples
from covering import each, pairwise, slow_but
from cpu_paths import (
    DTYPES,
    STORED_SCHEMES,
    Int8,
    Weight,
    everywhere,
    normal,
    pattern,
    random_weight,
    same,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qllm.config import SCHEMES
from qllm.quant.packing import BITS

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = (-1, 16, 20, 32, 100, 128)
SHAPES = ((1, 1), (13, 67), (40, 256), (64, 100), (70, 33), (97, 300))  # (N, K)
ROWS = (1, 2, 3, 4, 5, 7, 13, 33, 200)
each_type_and_all_bits = pytest.mark.parametrize(
    ("bits", "dtype"), slow_but(each(BITS, DTYPES), BITS, DTYPES), ids=str
)
SPECIAL = (math.inf, -math.inf, math.nan)


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def assert_close(weight: Weight, x: Tensor, bias: Tensor | None, got: Tensor) -> None:
    """The error is at most twice that of the reference in the same type."""
    assert got.dtype == x.dtype and got.shape == (len(x), len(weight.matrix))
    exact = weight.exact(x, bias)
    error = rms(got.double() - exact)
    allowed = 2 * rms(weight.reference(x, bias).double() - exact)
    size = torch.finfo(x.dtype).eps * rms(weight.size(x, bias))
    # The reference may be exact by chance, the more so the fewer numbers it finds.
    allowed += size / 16 if got.numel() > 64 else size
    assert error <= allowed, f"{error / size:.3} of an ulp, {allowed / size:.3} allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_at_most_twice_the_reference_s(bits, dtype):
    cases = pairwise(GROUPS, SHAPES, STORED_SCHEMES, (torch.float16, torch.float32))
    for i, (group_size, shape, scheme, scales_dtype) in enumerate(cases):
        weight = random_weight(shape, bits, group_size, scheme, scales_dtype)
        for rows in (ROWS[i % 9], ROWS[(i + 4) % 9]):
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
        for columns in (128, 160, 384):
            x = torch.full((5, columns), value * 2.0**-15).to(dtype)
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
        for rows in (1, 2, 3, 4, 5, 8, 10, 15, 16, 17, 24, 25):
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


def special_rows(x: Tensor) -> dict[int, Tensor]:
    """Rows with infinities and NaN in several places, by where they go in x."""
    rows, columns = len(x), x.shape[1]
    inf, minus_inf, nan = SPECIAL
    places = (
        {0: inf},
        {columns - 1: minus_inf},
        {columns // 2: nan},
        {1: inf, columns - 2: inf},
        {1: inf, 2: minus_inf},
        {0: nan, columns // 2: inf},
        dict.fromkeys(range(columns), inf),
        dict.fromkeys(range(columns), nan),
    )
    found = {}
    for i, place in enumerate(places):
        at = i * rows // len(places)
        found[at] = x[at].clone()
        for column, value in place.items():
            found[at][column] = value
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", STORED_SCHEMES)
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_infinities_and_nan(bits, scheme, dtype):
    for rows, shape in ((8, (40, 100)), (200, (70, 67)), (17, (3, 300))):
        weight = random_weight(shape, bits, 32, scheme)
        x, bias = normal(rows, shape[1], dtype=dtype), normal(shape[0], dtype=dtype)
        before = weight.everywhere(x, bias)
        special = special_rows(x)
        for row, values in special.items():
            x[row] = values
        got = weight.everywhere(x, bias)
        # Not torch's product in bfloat16, in which, on AMX, a row shows what is no number in the
        # next one: https://github.com/uxlfoundation/oneDNN/issues/5717
        assert torch.equal(pattern(got), pattern(weight.exact(x, bias)))
        finite = [row for row in range(rows) if row not in special]
        assert before.isfinite().all() and same(got[finite], before[finite])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_bias(dtype):
    weight, x = random_weight((40, 100), 4, 32), normal(5, 100, dtype=dtype)
    bias = normal(40, dtype=dtype)
    before = weight.everywhere(x, bias)
    bias[[3, 20, 39]] = torch.tensor(SPECIAL, dtype=dtype)
    got = weight.everywhere(x, bias)
    assert torch.equal(pattern(got), pattern(weight.exact(x, bias)))
    others = [i for i in range(40) if i not in (3, 20, 39)]
    assert same(got[:, others], before[:, others])


SIZES = (2.0**-149, 1e-44, 1e-40, 1e-38, 1e-30, 1e-6, 1e-3, 100.0, 1e20, 2.0**97, 2.0**101, 1e36)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_any_size(dtype):
    # From 2^100 on, and nowhere else, a row's sum is one of floats.
    weight = random_weight((40, 300), 4, 128)
    x = normal(len(SIZES), 300).double() * torch.tensor(SIZES, dtype=torch.float64)[:, None]
    x = x.to(dtype)
    x = x[x.isfinite().all(dim=1)]
    got = weight.everywhere(x)
    for i, row in enumerate(x.split(1)):
        exact, size = weight.exact(row), weight.size(row)
        error = (got[i].double() - exact).abs()
        # Below the normal numbers rounding is by a fixed step, at each of four sums.
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        allowed = torch.finfo(dtype).eps * (exact.abs() / 2 + size / 8) + 4 * step
        assert (error <= allowed).all(), row.abs().max().item()
        assert same(weight.everywhere(row)[0], got[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_of_huge_numbers_is_as_exact(dtype):
    for scheme, scale in itertools.product(SCHEMES, (1.0, 2.0**101, 2.0**110)):
        weight = random_weight((64, 2000), 4, 128, scheme)
        x = (normal(5, 2100) * scale).to(dtype)[:, 50:2050]
        bias = (normal(64) * 50 * scale).to(dtype)
        got = weight.everywhere(x, bias)
        assert_close(weight, x, bias, got)
        assert same(weight.everywhere(x[3:4], bias), got[3:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers(dtype):
    largest = torch.finfo(dtype).max
    x = torch.zeros(6, 100, dtype=dtype)
    x[0, 0] = x[1, 99] = x[2, 50] = largest
    x[3, 7] = x[4, 40] = -largest
    x[5] = largest / 128
    q = np.random.default_rng(0).integers(0, 16, (40, 100))
    for scale in (2.0**-10, 1.0):
        weight = weight_of(q, None, torch.full((40, 4), scale).half(), 4, 32)
        got = weight.everywhere(x)
        # One product is its own sum; it is infinite where it does not fit the type.
        assert torch.equal(got[:5], weight.exact(x[:5]).to(dtype))
        assert got[:5].isfinite().all() == (scale < 1)
    # Sums within the type, of products that are.
    weight = weight_of(q, None, torch.full((40, 4), 2.0**-10).half(), 4, 32)
    error = (weight.everywhere(x)[5].double() - weight.exact(x)[5]).abs()
    assert (error <= torch.finfo(dtype).eps * weight.size(x)[5]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_any_strides(dtype):
    weight, integers = random_weight((40, 100), 4, 32), Int8.random((40, 100))
    wide = normal(9, 250, dtype=dtype)
    tall = normal(100, 9, dtype=dtype)
    bias = normal(80, dtype=dtype)[::2]
    for x in (wide[:, 70:170], wide[::2, :100], wide[:1, :100], tall.t(), tall.t()[3:4]):
        for run in (weight.kernel, integers.kernel):
            expected = run(x.contiguous().clone(), bias.contiguous())
            assert same(everywhere(lambda run=run, x=x: run(x, bias)), expected)
    row = wide[:1, :100]
    for x in (row.expand(5, 100), torch.as_strided(row, (1, 100), (1, 1))):
        for run in (weight.kernel, integers.kernel):
            expected = run(x.clone(memory_format=torch.contiguous_format), bias)
            assert same(everywhere(lambda run=run, x=x: run(x, bias)), expected)
    assert (wide[:0, :100].shape[0], 40) == weight.everywhere(wide[:0, :100]).shape


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
def test_int8_of_numbers_of_any_size(dtype):
    weight = Int8.random((40, 300))
    x = normal(len(SIZES), 300).double() * torch.tensor(SIZES, dtype=torch.float64)[:, None]
    x = x.to(dtype)  # some are infinite then
    x[-1, 3] = torch.finfo(dtype).max
    weight.assert_exact(x)
    for scale in (2.0**-149, 1e-40, 1e-3, 1.0, 1e30, 3e38):
        weight.assert_exact(x, None, torch.tensor(scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.02])
def test_int8_of_infinities_and_nan(scale, dtype):
    scale = None if scale is None else torch.tensor(scale)
    for rows, shape in ((8, (40, 100)), (200, (70, 67)), (17, (3, 300))):
        weight, x = Int8.random(shape), normal(rows, shape[1], dtype=dtype)
        for row, values in special_rows(x).items():
            x[row] = values
        weight.assert_exact(x, normal(shape[0], dtype=dtype), scale)


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
