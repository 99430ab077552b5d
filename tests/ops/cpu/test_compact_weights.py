"""Weights that the kernels hold in fewer bytes than they came in, and the same to the bit.

Scales that are products of few numbers and small integers, or powers of two, and integers of which
there are few.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from cpu_paths import (
    DTYPES,
    STORED_SCHEMES,
    Weight,
    everywhere,
    factored_weight,
    kernel,
    leveled_weight,
    normal,
    random_weight,
    same,
)
from hypothesis import given
from hypothesis import strategies as st

from qllm.config import SCHEMES
from qllm.ops import reference
from qllm.ops.cpu import linear
from qllm.quant.packing import BITS

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORED, POWERS = torch.int8, torch.uint8


def assert_the_same(weight: Weight, way: str = "_factored") -> None:
    """Numbers and rows as stored; and the products of what is not made smaller, to the bit."""
    request, stored = weight.request, weight.stored
    layout = kernel("weight_only_linear").layout
    packed = weight.packed
    got = (everywhere(lambda i=i: layout.unpack(packed, request)[i]) for i in range(3))
    assert all(torch.equal(*pair) for pair in zip(got, stored[:3], strict=True))
    index = torch.arange(request.out_features).flip(0)
    shape = (request.bits, request.group_size, request.in_features)
    for dtype in DTYPES:
        want = reference.packed_embedding(index, stored, *shape, dtype)
        rows = everywhere(lambda dtype=dtype: layout.look_up(index, packed, request, dtype))
        assert torch.equal(rows, want)
    with patch.object(linear, way, return_value=None):
        plain = Weight(request, stored, weight.matrix)
        assert sum(t.nbytes for t in plain.packed[:3]) >= sum(t.nbytes for t in packed[:3])
    for rows in (1, 3, 7, 40):
        x = normal(rows, request.in_features)
        x[-1, 0] = 1e38  # left to float arithmetic
        assert same(weight.everywhere(x), plain.everywhere(x))
        assert same(weight.everywhere_int8(x), plain.everywhere_int8(x))


@pytest.mark.covering(2)
@pytest.mark.parametrize("scheme", STORED_SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [16, 32])
def test_products_are_those_of_float32(bits, group_size, scheme):
    for shape in ((33, 512), (16, 300)):
        weight = factored_weight(shape, bits, group_size, scheme)
        assert weight.packed.scales.dtype == FACTORED
        assert (weight.packed.qzeros.dtype == FACTORED) == (scheme == "offset")
        assert weight.packed.scales.nbytes < 4 * 48 * weight.stored.scales.shape[1] / 2
        assert_the_same(weight)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 600)),
    group_size=st.sampled_from([16, 32]),
    scheme=st.sampled_from(STORED_SCHEMES),
    seed=st.integers(0, 2**32),
)
def test_any_shape(shape, group_size, scheme, seed):
    assert_the_same(factored_weight(shape, 3, group_size, scheme, seed))


def with_scales(*scales: float) -> Weight:
    """A row of 16 groups of 16, whose first scales are these, and the others 1."""
    weight = random_weight((1, 256), 6, 16, "sym", torch.float32)
    numbers = torch.tensor([[*scales, *[1.0] * (16 - len(scales))]], dtype=torch.float32)
    return Weight(weight.request, weight.stored._replace(scales=numbers), weight.matrix)


HALVES = 0.333251953125  # of float16


@pytest.mark.parametrize(
    "scales",
    [
        (0.0,) * 16,
        (0.0, -0.0, 1.0),
        (128.0, -127.0),
        (-128.0, 127.0),
        tuple(HALVES * i for i in range(-8, 8)),
        tuple(2.0**-120 * i for i in range(1, 17)),
        tuple(2.0**100 * i for i in range(1, 17)),
        (float(np.float32(0.1)),) * 16,
    ],
    ids=repr,
)
def test_numbers_that_are_products(scales):
    weight = with_scales(*scales)
    assert weight.packed.scales.dtype == FACTORED
    assert_the_same(weight)


@pytest.mark.parametrize(
    "scales",
    [
        (float("nan"),),
        (float("inf"),),
        (129.0,),
        (128.0, -128.0),
        (0.1, 0.2, 0.4),
        (2.0**-130,),
        (3 * 2.0**40,),
        (float(np.float32(0.1)), 0.25),
    ],
    ids=repr,
)
def test_others_stay_float32(scales):
    weight = with_scales(*scales)
    assert weight.packed.scales.dtype == torch.float32
    assert same(weight.packed.scales[0, :, 0], weight.stored.scales[0])


def test_offsets_and_scales_go_together():
    weight = factored_weight((20, 256), 4, 32, "offset")
    offsets = normal(20, 8)
    for stored in (
        weight.stored._replace(qzeros=offsets),
        weight.stored._replace(scales=offsets),
    ):
        packed = Weight(weight.request, stored, weight.matrix).packed
        assert packed.scales.dtype == packed.qzeros.dtype == torch.float32
        assert same(packed.scales[0, :, 3], stored.scales[3])
        assert same(packed.qzeros[0, :, 3], stored.qzeros[3])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [16, 32])
def test_powers_of_two_are_exponents(group_size, scheme):
    random = np.random.default_rng(group_size)
    for shape in ((33, 512), (16, 300)):
        weight = random_weight(shape, 5, group_size, scheme, torch.float32)
        exponents = torch.from_numpy(random.integers(-126, 20, weight.stored.scales.shape))
        stored = weight.stored._replace(scales=torch.ones(exponents.shape).ldexp(exponents))
        weight = Weight(weight.request, stored, weight.matrix)
        assert weight.packed.scales.dtype == POWERS
        assert_the_same(weight, "_powers")


def test_largest_and_least_power():
    weight = with_scales(2.0**127, 2.0**-126)
    assert weight.packed.scales.dtype == POWERS
    assert same(weight.layout.unpack(weight.packed, weight.request).scales, weight.stored.scales)


@pytest.mark.covering(2)
@pytest.mark.parametrize("scheme", STORED_SCHEMES)
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 20, 32])
def test_few_integers_are_levels(bits, group_size, scheme):
    for shape, levels in (((33, 512), 16), ((64, 300), 3)):
        weight = leveled_weight(shape, bits, group_size, scheme, levels)
        assert weight.packed.qweight.dim() == 1
        assert_the_same(weight, "_levels")
    assert leveled_weight((33, 512), bits, group_size, scheme, 17).packed.qweight.dim() == 4


def test_levels_are_of_all_rows():
    """Each has few, and together they have more."""
    weight = leveled_weight((64, 256), 8, 32, "sym")
    q = torch.arange(64, dtype=torch.uint8)[:, None].expand(64, 256)
    stored = weight.stored._replace(qweight=q.contiguous())
    packed = Weight(weight.request, stored, weight.matrix).packed
    assert packed.qweight.dim() == 4


def test_both_at_once():
    factored = factored_weight((40, 512), 8, 16, "sym")
    levels = leveled_weight((40, 512), 8, 16, "sym")
    stored = levels.stored._replace(scales=factored.stored.scales)
    weight = Weight(levels.request, stored, levels.matrix)
    assert weight.packed.qweight.dim() == 1 and weight.packed.scales.dtype == FACTORED
    for way in ("_levels", "_factored"):
        assert_the_same(weight, way)
