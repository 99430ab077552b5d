"""Dense layers, on every path of this machine."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext

import exact
import numpy as np
import pytest
import torch
from amx_tiles import started, tile_library
from covering import each, slow_but
from cpu_paths import (
    DTYPES,
    assert_rows_are_their_own,
    everywhere,
    normal,
    on,
    paths,
    pattern,
    same,
)
from exact import assert_rounded_once
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qllm.ops import phase
from qllm.ops.cpu import library as native
from qllm.ops.cpu import linear

pytestmark = pytest.mark.usefixtures("one_thread")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Inputs: fewer than a vector has, blocks of 128 and of 256 and a bit more. Outputs: a panel is 16,
# four of them go together.
SHAPES = ((1, 1), (1, 5), (3, 2), (7, 5), (15, 3), (16, 4), (17, 13), (64, 64), (100, 67))
SHAPES += ((129, 16), (256, 81), (300, 130), (768, 33))
# Up to 8 are kept in registers, 12 make a tile, 768 are held at once.
ROWS = (*range(1, 10), 11, 12, 13, 16, 17, 24, 25, 31, 32, 33, 37, 48, 70, 191, 768, 769)
PAIRS = ("amx", "avx512bf16")  # paths that multiply bfloat16 two by two


@pytest.fixture(scope="module", autouse=True, params=["prefill", "decode"])
def each_phase(request) -> Iterator[None]:
    """All of this holds in either: what of it is the order of a sum is not the same."""
    with phase.decode() if request.param == "decode" else nullcontext():
        yield


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> ctypes.CDLL:
    """The path for AMX, whose instructions are trapped."""
    return started(tile_library(tmp_path_factory, "trapped"))


@pytest.fixture(params=native.PATHS)
def path(request, monkeypatch):
    """A path of this machine, or that for AMX, trapped."""
    if request.param != "amx" or "amx" in paths():
        with on(request.param):
            yield request.param
        return
    library = request.getfixturevalue("tiles")
    if library.path != "amx":
        pytest.skip("this machine lacks AVX-512 VNNI")
    monkeypatch.setattr(native, "library", lambda: library)
    yield request.param


def size_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
    """Of what is summed up."""
    size = np.abs(exact.numpy(x)) @ np.abs(exact.numpy(weight)).T
    return size if bias is None else size + np.abs(exact.numpy(bias))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
    y = exact.numpy(x) @ exact.numpy(weight).T
    return y if bias is None else y + exact.numpy(bias)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    # Every type has inputs that are a vector and a bit more, and an odd number of them.
    slow_but(
        [*each(SHAPES, DTYPES), *itertools.product(((17, 13), (129, 16)), DTYPES)], SHAPES, DTYPES
    ),
    ids=str,
)
def test_they_are_rounded_once_and_rows_are_their_own(shape, dtype, path):
    inputs, outputs = shape
    x, weight = normal(70, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype)
    bias = normal(outputs + 1, dtype=dtype)[1:]
    for b in (bias, None):
        whole = assert_rows_are_their_own(lambda x, b=b: linear.dense_linear(x, weight, b), x)
        assert_rounded_once(whole, product(x, weight, b), size_of(x, weight, b))
        for rows in (rows for rows in ROWS if rows < len(x)):
            some = slice(rows) if b is None else slice(-rows, None)
            assert same(linear.dense_linear(x[some], weight, b), whole[some])


@pytest.mark.covering(2)
@dtypes
@pytest.mark.usefixtures("one_thread")  # which takes as many channels at once as there may be
def test_any_number_of_rows_gives_the_same(dtype, path):
    x, weight = normal(780, 150, dtype=dtype), normal(299, 150, dtype=dtype)
    whole = linear.dense_linear(x, weight, None)
    assert_rounded_once(whole, product(x, weight, None), size_of(x, weight, None))
    for rows in ROWS:
        assert same(linear.dense_linear(x[:rows], weight, None), whole[:rows])
    # A rank's channels are those of the whole.
    for some in (slice(5, 30), slice(0, 290)):
        assert same(linear.dense_linear(x[-70:], weight[some], None), whole[-70:, some])


@dtypes
@given(
    st.integers(1, 40), st.integers(1, 300), st.integers(1, 70), st.booleans(), st.integers(0, 9)
)
def test_paths_agree_to_the_bit(dtype, rows, inputs, outputs, has_bias, seed):
    """All of them but those that multiply in pairs, which come as near."""
    x, weight = (normal(n, inputs, dtype=dtype, seed=seed) for n in (rows, outputs))
    bias = normal(outputs, dtype=dtype, seed=seed) if has_bias else None
    exceptions = PAIRS if dtype == torch.bfloat16 else ()
    got = everywhere(lambda: linear.dense_linear(x, weight, bias), exceptions)
    others = []
    for name in set(exceptions) & set(paths()):
        with on(name):
            others.append(linear.dense_linear(x, weight, bias))
    for y in (got, *others):
        assert_rounded_once(y, product(x, weight, bias), size_of(x, weight, bias))


@pytest.mark.covering(2)
@dtypes
def test_a_row_is_not_its_neighbours_(dtype, path):
    x, weight = normal(29, 70, dtype=dtype), normal(30, 70, dtype=dtype)
    clean = linear.dense_linear(x, weight, None)
    x[2, 69], x[5, 0], x[20, 17] = math.nan, math.inf, -math.inf
    got = linear.dense_linear(x, weight, None)
    assert got[2].isnan().all() and not got[[5, 20]].isfinite().any()
    rest = [row for row in range(29) if row not in (2, 5, 20)]
    assert same(got[rest], clean[rest])


@pytest.mark.covering(2)
@dtypes
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_what_is_no_number_gives_what_torch_gives(rows, dtype, path):
    x, weight = normal(rows, 40, dtype=dtype), normal(20, 40, dtype=dtype)
    weight[3, 7], weight[4, 8], weight[5, 9] = math.inf, math.nan, -math.inf
    x[0, 7], x[-1, 9] = 0, math.inf
    got = linear.dense_linear(x, weight, None)
    expected = torch.nn.functional.linear(x.double(), weight.double())
    assert torch.equal(pattern(got), pattern(expected))


@pytest.mark.covering(2)
@dtypes
@pytest.mark.parametrize("rows", [1, 20])
def test_subnormal_numbers_count(rows, dtype, path):
    """But where bfloat16 is multiplied in pairs: those instructions take them for zero."""
    smallest = torch.finfo(dtype).smallest_normal
    pairs = dtype == torch.bfloat16 and path in PAIRS
    for value, factor in ((smallest / 4, 2.0), (2.0, smallest / 4), (smallest, 0.5)):
        x = torch.full((rows, 3), value, dtype=dtype)
        weight = torch.full((5, 3), factor, dtype=dtype)
        want = 0 if pairs else 3 * value * factor
        assert (linear.dense_linear(x, weight, None) == want).all()
        # What is added to a sum is: by other instructions.
        bias = torch.full((5,), smallest / 4, dtype=dtype)
        assert (linear.dense_linear(x, weight, bias) == want + smallest / 4).all()
    # The one place where it takes a small number for paths to differ in an infinity.
    x = torch.full((rows, 1), math.inf, dtype=dtype)
    got = linear.dense_linear(x, torch.full((5, 1), smallest / 4, dtype=dtype), None)
    assert (got.isnan() if pairs else got.isposinf()).all()


@pytest.mark.covering(2)
@dtypes
def test_tensors_need_not_be_contiguous(dtype, path):
    wide, tall = normal(5, 2 * 36, dtype=dtype), normal(36, 5, dtype=dtype)
    few, square = normal(36, 3, dtype=dtype)[:, 1], normal(36, 36, dtype=dtype).t()
    for x in (wide[:, ::2], tall.t(), tall.t()[:1], wide[:1, 1:37].expand(5, 36)):
        got = linear.dense_linear(x, square, few)
        expected = linear.dense_linear(x.contiguous(), square.contiguous(), few.contiguous())
        assert same(got, expected)


def test_parameters_of_another_type_are_taken_in_that_of_x(path):
    x, half = normal(5, 36), normal(36, dtype=torch.float16)
    square = normal(36, 36, dtype=torch.bfloat16)
    want = linear.dense_linear(x, square.float(), half.float())
    assert same(linear.dense_linear(x, square, half), want)


def test_no_rows_no_channels(path):
    assert linear.dense_linear(torch.empty(0, 36), normal(5, 36), None).shape == (0, 5)
    assert linear.dense_linear(normal(3, 36), torch.empty(0, 36), None).shape == (3, 0)
    assert same(linear.dense_linear(torch.empty(3, 0), torch.empty(5, 0), None), torch.zeros(3, 5))
