"""Infinities, NaN, and numbers of any size and stride in the CPU kernels' products."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cpu_paths import (
    DTYPES,
    STORED_SCHEMES,
    Int8,
    everywhere,
    normal,
    paths,
    pattern,
    random_weight,
    same,
    weight_of,
)
from product_cases import assert_close
from torch import Tensor

from qllm.config import SCHEMES
from qllm.ops.cpu import steps

pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = (math.inf, -math.inf, math.nan)


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
        # One of many, whatever order compilers give to operands of which two are none.
        none = got[got.isnan()]
        assert same(none, torch.full_like(none, math.nan))
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


def test_numbers_of_float16_where_subnormal_floats_are_flushed():
    x = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()]
    zeros = torch.zeros_like(x)
    paths()
    assert torch.set_flush_denormal(True)
    try:
        got = everywhere(lambda: steps.add(x, zeros))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, x)


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
