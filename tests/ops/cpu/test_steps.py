"""What lies between a decoder's linear layers, on every path of this machine; not attention."""

from __future__ import annotations

import itertools
import math

import exact
import numpy as np
import pytest
import torch
from cpu_paths import DTYPES, assert_rows_are_their_own, normal, on, same
from exact import assert_rounded_once
from torch import Tensor

from qllm.ops import reference
from qllm.ops.cpu import library as native
from qllm.ops.cpu import steps

pytestmark = pytest.mark.usefixtures("one_thread", "path")

CHANNELS = (1, 2, 15, 16, 17, 64, 100, 768)
ROWS = (1, 2, 5, 33)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=native.PATHS)
def path(request):
    with on(request.param):
        yield request.param


# Activation functions


def numbers(dtype: torch.dtype) -> Tensor:
    """Of all sizes of which some times are no infinity, and many where the functions bend."""
    largest = 4 if dtype == torch.float16 else 37
    sizes = np.concatenate([[0.0], np.logspace(-46, largest, 500), np.linspace(0, 20, 401)])
    return torch.from_numpy(np.concatenate([sizes, -sizes])).to(dtype)


@pytest.mark.covering(2)
@dtypes
@pytest.mark.parametrize("name", exact.ACTIVATIONS)
def test_activations_of_all_sizes(name, dtype):
    x = numbers(dtype)
    up = normal(len(x), dtype=dtype)
    for gated in (False, True):
        run = steps.gated_activation if gated else steps.activation
        got = run(torch.cat([x, up])[None] if gated else x[None], name)[0]
        factor = exact.numpy(up) if gated else 1.0
        want = exact.ACTIVATIONS[name](exact.numpy(x)) * factor
        fits = np.abs(want) <= torch.finfo(dtype).max  # squares may not
        assert name == "relu2" or fits.all()
        assert got[~torch.from_numpy(fits)].isinf().all()
        size = np.maximum(np.abs(exact.numpy(x) * factor), np.abs(want))
        assert_rounded_once(got[fits], want[fits], size[fits])
    if name == "relu":
        assert same(steps.activation(x[None], name)[0].abs(), reference.activation(x, name).abs())


@pytest.mark.covering(2)
@dtypes
@pytest.mark.parametrize("name", exact.ACTIVATIONS)
def test_activations_of_what_is_no_number(name, dtype):
    x = normal(1, 40, dtype=dtype)
    clean = steps.activation(x, name)
    x[0, [3, 17, 39]] = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    got = steps.activation(x, name)
    assert got[0, 3] == math.inf and got[0, 39].isnan()
    # As 0 times infinity.
    assert got[0, 17] == 0 if name.startswith("relu") else got[0, 17].isnan()
    rest = x[0].isfinite()
    assert same(got[0, rest], clean[0, rest])
    gated = steps.gated_activation(torch.cat([clean, x], dim=1), name)
    assert gated[0, 39].isnan() and same(gated[0, rest], gated[0, rest].nan_to_num(9, 9, 9))


@pytest.mark.covering(2)
@dtypes
@pytest.mark.parametrize("name", exact.ACTIVATIONS)
def test_activations_of_all_shapes(name, dtype):
    for channels, rows in itertools.product(CHANNELS, (*ROWS, 70)):
        x = normal(rows, 2 * channels, dtype=dtype) * 3
        both = assert_rows_are_their_own(lambda x: steps.gated_activation(x, name), x)
        gate, up = x.chunk(2, dim=1)  # whose rows lie apart
        want = exact.ACTIVATIONS[name](exact.numpy(gate))
        for got, factor in ((both, exact.numpy(up)), (steps.activation(gate, name), 1.0)):
            size = np.maximum(np.abs(exact.numpy(gate) * factor), np.abs(want * factor))
            assert_rounded_once(got, want * factor, size)


# Norms


def run_norm(x: Tensor, affine: tuple, eps: float, *, centered: bool) -> Tensor:
    """A norm of the rows of x, which is held to float64."""
    weight, bias = affine[0], affine[1] if centered else None
    if centered:
        got = steps.layer_norm(x, weight, bias, eps)
    else:
        got = steps.rms_norm(x, weight, eps)
    assert_rounded_once(got, *exact.norm(x, weight, bias, eps, centered=centered))
    return got


@dtypes
@pytest.mark.parametrize("centered", [True, False])
def test_norms_of_all_shapes(centered, dtype):
    for channels, rows in itertools.product(CHANNELS, (*ROWS, 70)):
        weight, bias = normal(2, channels, dtype=dtype)
        x = normal(rows, channels, dtype=dtype) * 3 + 1
        for affine in itertools.product((weight, None), (bias, None)):
            run_norm(x, affine, 1e-5, centered=centered)
        assert_rows_are_their_own(
            lambda x, w=weight, b=bias: run_norm(x, (w, b), 1e-5, centered=centered), x
        )


@pytest.mark.covering(2)
@dtypes
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1.0])
@pytest.mark.parametrize("centered", [True, False])
def test_norms_of_rows_of_any_size(centered, eps, dtype):
    """Large and small, far from 0, with an outlier, all alike, all zero."""
    for channels in (1, 17, 768, 8192):
        x = normal(9, channels).double()
        sizes = (1e-20, 1e-4, 1.0, 1e4)
        rows = [row * size for row, size in zip(x, sizes, strict=False)]
        outlier = x[4].clone()
        outlier[channels // 2] = 500.0
        rows += [x[5] + 100, x[6] - 1000, outlier, torch.full_like(x[0], 0.1), x[8] * 0]
        weight, bias = normal(2, channels, dtype=dtype)
        run_norm(torch.stack(rows).to(dtype), (weight, bias), eps, centered=centered)


def test_norms_of_what_is_no_number():
    x = normal(4, 100)
    clean = steps.layer_norm(x, None, None, 1e-5), steps.rms_norm(x, None, 1e-5)
    x[1, 99], x[2, 3] = math.nan, math.inf
    got = steps.layer_norm(x, None, None, 1e-5), steps.rms_norm(x, None, 1e-5)
    for a, b in zip(got, clean, strict=True):
        assert same(a[[0, 3]], b[[0, 3]])
        assert a[1].isnan().all() and a[2, 3].isnan()


# Sums and embeddings


@pytest.mark.covering(2)
@dtypes
@pytest.mark.parametrize("count", [1, 7, 16, 17, 4095, 4096, 4097, 8200, 32768, 32769, 50001])
def test_a_sum_is_rounded_once(count, dtype):
    x, z = normal(2, count, dtype=dtype)
    x[-1], z[0] = math.inf, math.nan
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = steps.add(x[None], z[None])[0]
        assert got[0].isnan() and (count == 1 or got[-1] == math.inf)
        assert same(got[1:], (x[1:].double() + z[1:].double()).to(dtype))


@dtypes
def test_embedding_takes_rows(dtype):
    for channels, rows, offset in itertools.product(CHANNELS, ROWS, (0, 2, -1)):
        table = normal(40, channels, dtype=dtype)
        index = torch.arange(rows) * 7 % 38 - min(offset, 0)
        index[-1] = 39 - offset  # the last
        index[0] = -offset  # the first
        want = table[index + offset]
        assert same(steps.embedding(index, table, offset), want)
        assert same(steps.embedding(index.to(torch.int32), table, offset), want)
        apart = normal(80, channels, dtype=dtype)[::2], index.repeat_interleave(2)[::2]
        assert same(steps.embedding(apart[1], apart[0], offset), apart[0][index + offset])
    assert steps.embedding(index[:0], table, 0).shape == (0, channels)


@pytest.mark.covering(2)
@pytest.mark.parametrize("wrong", [-1, 40, 41, -(2**63), 2**63 - 3, 2**40])
@pytest.mark.parametrize("offset", [0, 2])
def test_an_index_outside_the_table_is_an_error(wrong, offset):
    table = normal(40 + offset, 16)
    if wrong == -1 and offset:
        wrong = -3
    for place in (0, 3, 4):
        index = torch.arange(5)
        index[place] = wrong
        with pytest.raises(IndexError, match="an index is outside its table"):
            steps.embedding(index, table, offset)


# Tensors of any layout and type


@dtypes
def test_tensors_need_not_be_contiguous(dtype):
    wide = normal(5, 2 * 36, dtype=dtype)
    tall, few = normal(36, 5, dtype=dtype), normal(36, 3, dtype=dtype)[:, 1]
    for x in (wide[:, ::2], tall.t(), tall.t()[:1], wide[:1, 1:37].expand(5, 36)):
        y = x.contiguous()
        one = few.contiguous()
        for name in ("silu", "gelu"):
            assert same(steps.activation(x, name), steps.activation(y, name))
            assert same(steps.gated_activation(x, name), steps.gated_activation(y, name))
        assert same(steps.layer_norm(x, few, few, 0.1), steps.layer_norm(y, one, one, 0.1))
        assert same(steps.rms_norm(x, few, 0.1), steps.rms_norm(y, one, 0.1))
        assert same(steps.add(x, y), x + x) and same(steps.add(y, x), x + x)


def test_parameters_of_another_type_are_taken_in_that_of_x():
    x, half = normal(5, 36), normal(36, dtype=torch.float16)
    assert same(steps.layer_norm(x, half, half, 0.1), steps.layer_norm(x, *2 * [half.float()], 0.1))
    assert same(steps.rms_norm(x, half, 0.1), steps.rms_norm(x, half.float(), 0.1))


def test_nothing_is_empty_handed():
    none = torch.empty(0, 36)
    assert steps.layer_norm(none, None, None, 0.1).shape == (0, 36)
    assert steps.rms_norm(none, None, 0.1).shape == steps.activation(none, "silu").shape == (0, 36)
    assert steps.gated_activation(none, "gelu").shape == (0, 18)
    assert steps.add(none, none).shape == (0, 36)
