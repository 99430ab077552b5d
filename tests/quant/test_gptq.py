"""GPTQ against the paper's procedure in float64, and where its inputs are at an edge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from correlated import COLUMNS, ROWS, drawn, restored
from test_rtn import exact_scale, groups_of

from qllm.config import SCHEMES
from qllm.quant import gptq
from qllm.quant.algorithm import GPTQOptions
from qllm.quant.clip import clipped_qparams
from qllm.quant.gptq import quantize_gptq, triangular_root
from qllm.quant.packing import BITS, PackedWeight, packed_size, unpack
from qllm.quant.rtn import quantize_rtn

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = (False, True)


def output_error(matrix, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T) in float64."""
    error = torch.as_tensor(matrix).double() - weight
    return ((error @ hessian.double()) * error).sum().item()


class Grid:
    """The grid of a group (N, g), by DESIGN §3 with scales as they are stored."""

    def __init__(self, group: np.ndarray, bits: int, scheme: str) -> None:
        self.top = 2**bits - 1
        self.scale = exact_scale(group, bits, scheme).astype(np.float16).astype(np.float64)
        low = np.minimum(group.min(axis=1), 0)
        asym = np.clip(np.rint(-low / self.scale), 0, self.top)
        self.zero = asym if scheme == "asym" else np.full(len(group), 2 ** (bits - 1))

    def nearest(self, column: np.ndarray) -> np.ndarray:
        q = np.clip(np.rint(column / self.scale) + self.zero, 0, self.top)
        return (q - self.zero) * self.scale


def by_the_paper(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group_size: int,
    scheme: str,
    options: GPTQOptions,
) -> np.ndarray:
    """The quantized matrix (N, K) by Algorithm 1 of the paper, one column per block: with the
    Cholesky factor of the inverse of H, errors reach all later columns at once."""
    work, columns = weight.double().numpy().copy(), weight.shape[1]
    h = hessian.double()
    h = h + options.damp * h.diagonal().mean() * torch.eye(columns)
    perm = np.arange(columns)
    if options.act_order:
        perm = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    inverse = torch.linalg.inv(h[perm][:, perm])
    factor = torch.linalg.cholesky(inverse).t().numpy()  # upper triangular, U^T U = H^-1
    spans = groups_of(columns, group_size)
    group = spans[0].stop
    static = [Grid(work[:, span], bits, scheme) for span in spans]
    work = work[:, perm]
    result = np.empty_like(work)
    for i in range(columns):
        if options.static_groups or len(spans) == 1:
            grid = static[perm[i] // group]
        elif i % group == 0:
            grid = Grid(work[:, i : i + group], bits, scheme)
        result[:, perm[i]] = q = grid.nearest(work[:, i])
        error = (work[:, i] - q) / factor[i, i]
        work[:, i:] -= np.outer(error, factor[i, i:])
    return result


@pytest.mark.covering(1)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_that_of_the_paper(bits, group_size, scheme):
    weight, hessian = drawn(seed=bits)
    form = (bits, group_size, scheme)
    nearest = restored(quantize_rtn(weight, *form), bits, group_size, COLUMNS)
    baseline = output_error(nearest, weight, hessian)
    for act_order, static_groups in itertools.product(FLAGS, FLAGS):
        options = GPTQOptions(act_order=act_order, static_groups=static_groups)
        packed, damp = quantize_gptq(weight, hessian, *form, options)
        got = restored(packed, bits, group_size, COLUMNS)
        expected = by_the_paper(weight, hessian, *form, options)
        errors = [output_error(matrix, weight, hessian) for matrix in (got, expected)]
        assert errors[0] < errors[1] * 1.01
        # In their own order, the last of 2-bit columns take more error than they can make up for.
        assert errors[0] < baseline or (bits == 2 and not act_order and not static_groups)
        assert damp == options.damp
        # A weight that ties in float32 moves those behind it in its row.
        same = np.abs(got.numpy() - expected) < packed.scales.float().min().item() / 2
        assert same.all(axis=1).mean() > 0.95


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_no_bitwidth_is_worse_than_rounding_to_nearest(bits, scheme):
    weight, hessian = drawn(seed=10 + bits)
    errors = []
    for packed in (
        quantize_rtn(weight, bits, 32, scheme),
        quantize_gptq(weight, hessian, bits, 32, scheme)[0],
    ):
        assert packed.qweight.shape == (ROWS, packed_size(COLUMNS, bits))
        errors.append(output_error(restored(packed, bits, 32, COLUMNS), weight, hessian))
    assert errors[1] < errors[0] * (0.99 if bits == 1 else 0.8)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_static_groups_have_the_grids_of_rounding_to_nearest(scheme):
    weight, hessian = drawn()
    nearest = quantize_rtn(weight, 4, 32, scheme)
    for act_order in FLAGS:
        options = GPTQOptions(act_order=act_order)
        found, _ = quantize_gptq(weight, hessian, 4, 32, scheme, options)
        assert found.perm is None
        assert torch.equal(found.scales, nearest.scales)
        assert torch.equal(found.qzeros, nearest.qzeros)
        assert found.scales.dtype == torch.float16 and found.qzeros.dtype == torch.uint8


def agreement(first: PackedWeight, second: PackedWeight, bits: int) -> float:
    """The share of rows with the same integers, all of the same shapes and types."""
    for one, other in zip(first[:3], second[:3], strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
    same = [unpack(packed.qweight, bits, COLUMNS) for packed in (first, second)]
    return (same[0] == same[1]).all(dim=1).double().mean().item()


@pytest.mark.parametrize("static_groups", FLAGS)
@pytest.mark.parametrize("block_size", [1, 7, 32, 100, 10_000])
def test_the_size_of_a_block_does_not_show(block_size, static_groups):
    weight, hessian = drawn()
    options = [
        GPTQOptions(block_size=size, static_groups=static_groups) for size in (128, block_size)
    ]
    for group_size in (-1, 40):
        form = (3, group_size, "asym")
        packed = [quantize_gptq(weight, hessian, *form, o)[0] for o in options]
        assert agreement(*packed, 3) > 0.95
        errors = [
            output_error(restored(p, 3, group_size, COLUMNS), weight, hessian) for p in packed
        ]
        assert errors[1] == pytest.approx(errors[0], rel=0.005)


@pytest.mark.parametrize(
    ("constant", "value"), [("CHUNK_ROWS", 7), ("CHUNK_ROWS", 64), ("SUB_COLUMNS", 5)]
)
@pytest.mark.parametrize("static_groups", FLAGS)
def test_the_size_of_a_piece_does_not_show(monkeypatch, static_groups, constant, value):
    weight, hessian = drawn(rows=90)
    options = GPTQOptions(static_groups=static_groups)
    whole, _ = quantize_gptq(weight, hessian, 4, 32, "asym", options)
    monkeypatch.setattr(gptq, constant, value)
    parts, _ = quantize_gptq(weight, hessian, 4, 32, "asym", options)
    assert agreement(whole, parts, 4) > 0.95
    if static_groups:
        assert torch.equal(parts.scales, whole.scales)
    errors = [output_error(restored(p, 4, 32, COLUMNS), weight, hessian) for p in (whole, parts)]
    assert errors[1] == pytest.approx(errors[0], rel=0.005)


def test_channels_without_input_are_rounded_to_nearest():
    weight, hessian = drawn()
    dead = torch.arange(3, COLUMNS, 10)
    hessian[dead], hessian[:, dead] = 0, 0
    nearest = restored(quantize_rtn(weight, 4, 32, "asym"), 4, 32, COLUMNS)
    for act_order in FLAGS:
        packed, damp = quantize_gptq(
            weight, hessian, 4, 32, "asym", GPTQOptions(act_order=act_order)
        )
        got = restored(packed, 4, 32, COLUMNS)
        assert torch.equal(got[:, dead], nearest[:, dead])
        assert not torch.equal(got, nearest)
        assert damp == 0.01


@pytest.mark.parametrize("static_groups", FLAGS)
@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_any_input_it_is_rounding_to_nearest(scheme, group_size, damp, static_groups):
    weight, _ = drawn()
    hessian = torch.zeros(COLUMNS, COLUMNS)
    options = GPTQOptions(damp=damp, static_groups=static_groups)
    packed, took = quantize_gptq(weight, hessian, 4, group_size, scheme, options)
    expected = quantize_rtn(weight, 4, group_size, scheme)
    for got, want in zip(packed[:3], expected[:3], strict=True):
        assert torch.equal(got, want)
    assert took == (damp or 1e-4)


def assert_root(root: torch.Tensor, hessian: torch.Tensor, damp: float) -> None:
    """R R^T is the damped Hessian, R is upper triangular, and its diagonal positive."""
    assert torch.equal(root, root.triu())
    assert (root.diagonal() > 0).all()
    damped = hessian.double() + damp * hessian.diagonal().mean() * torch.eye(len(hessian))
    error = root.double() @ root.double().t() - damped
    assert error.abs().max() < 1e-5 * damped.abs().max()


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_the_triangular_root(damp):
    _, hessian = drawn()
    before = hessian.clone()
    for perm in (torch.arange(COLUMNS), torch.randperm(COLUMNS)):
        root, took = triangular_root(hessian, perm, damp)
        assert torch.equal(hessian, before)
        assert took == damp
        assert_root(root, hessian[perm][:, perm], damp)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value):
    _, hessian = drawn()
    hessian[3, 3] = value
    with pytest.raises(ValueError, match="the Hessian's diagonal has a mean of"):
        triangular_root(hessian, torch.arange(COLUMNS), 0.01)


def test_a_singular_hessian_takes_more_dampening_and_says_so():
    """Fewer tokens than channels; in float32 their sum has eigenvalues below 0."""
    weight, hessian = drawn(tokens=40)
    hessian -= 2e-4 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    perm = torch.arange(COLUMNS)
    root, took = triangular_root(hessian, perm, 0.0)
    assert took == pytest.approx(1e-3)  # the first step, 1e-4, does not reach
    assert_root(root, hessian, took)
    assert triangular_root(hessian, perm, 1e-5)[1] == pytest.approx(1e-3)
    assert triangular_root(hessian, perm, 0.01)[1] == 0.01
    packed, again = quantize_gptq(weight, hessian, 4, 32, "asym", GPTQOptions(damp=0.0))
    assert again == took
    nearest = quantize_rtn(weight, 4, 32, "asym")
    errors = [output_error(restored(p, 4, 32, COLUMNS), weight, hessian) for p in (packed, nearest)]
    assert errors[0] < errors[1] / 2


def test_channels_in_order_of_their_inputs():
    weight, hessian = drawn()
    options = GPTQOptions(act_order=True, static_groups=False)
    packed, _ = quantize_gptq(weight, hessian, 8, 32, "sym", options)
    expected = hessian.diagonal().argsort(descending=True, stable=True)
    assert torch.equal(packed.perm, expected) and packed.perm.dtype == torch.int64
    got = restored(packed, 8, 32, COLUMNS)
    assert (got - weight).square().mean() < weight.square().mean() / 1000
    wrong = restored(packed._replace(perm=None), 8, 32, COLUMNS)
    assert (wrong - weight).square().mean() > weight.square().mean()


def test_all_of_a_channel_in_one_group_needs_no_order():
    weight, hessian = drawn()
    for group_size in (-1, COLUMNS, 10_000):
        options = GPTQOptions(static_groups=False)
        packed, _ = quantize_gptq(weight, hessian, 4, group_size, "asym", options)
        expected, _ = quantize_gptq(weight, hessian, 4, -1, "asym", GPTQOptions())
        assert packed.perm is None
        assert torch.equal(packed.qweight, expected.qweight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("static_groups", FLAGS)
@pytest.mark.parametrize("act_order", FLAGS)
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"),
    [(1, 40, 16), (8, 1, -1), (1, 1, 1), (8, 33, 1), (8, 33, 32), (8, 2, 128), (3, 129, 128)],
)
def test_shapes_at_an_edge(rows, columns, group_size, act_order, static_groups, scheme):
    weight, hessian = drawn(rows, columns)
    weight *= 64  # so that the scales of single weights are halves, too
    options = GPTQOptions(act_order=act_order, static_groups=static_groups, block_size=16)
    packed, _ = quantize_gptq(weight, hessian, 4, group_size, scheme, options)
    group = columns if group_size == -1 else group_size
    groups = -(-columns // group)
    assert packed.qweight.shape == (rows, packed_size(columns, 4))
    assert packed.scales.shape == (rows, groups)
    assert packed.qzeros.shape == ((rows, groups) if scheme == "asym" else (0,))
    got = restored(packed, 4, group_size, columns)
    expected = by_the_paper(weight, hessian, 4, group_size, scheme, options)
    errors = [output_error(matrix, weight, hessian) for matrix in (got, expected)]
    if (scheme, group) == ("sym", 1):  # every weight is half a step from two values of its grid
        assert errors[0] < errors[1] * 1.2
    else:
        assert np.abs(got.numpy() - expected).max() < 1e-3
        assert errors[0] == pytest.approx(errors[1], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("static_groups", FLAGS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-6, 1e8])
def test_scales_float16_cannot_hold_are_float32(monkeypatch, size, scheme, static_groups):
    """One row in another chunk is enough, and the others keep the scales they were rounded with."""
    monkeypatch.setattr(gptq, "CHUNK_ROWS", 20)
    weight, hessian = drawn(rows=50)
    weight[45] *= size
    options = GPTQOptions(static_groups=static_groups)
    packed, _ = quantize_gptq(weight, hessian, 4, 32, scheme, options)
    assert packed.scales.dtype == torch.float32
    assert torch.equal(packed.scales[:40], packed.scales[:40].half().float())
    got, nearest = (
        restored(p, 4, 32, COLUMNS) for p in (packed, quantize_rtn(weight, 4, 32, scheme))
    )
    for row in (0, 45):
        errors = [
            output_error(m[row : row + 1], weight[row : row + 1], hessian) for m in (got, nearest)
        ]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_weight_is_quantized_as_the_same_numbers_in_float32(dtype):
    weight, hessian = drawn(rows=20)
    weight = weight.to(dtype)
    for got, expected in zip(
        quantize_gptq(weight, hessian, 4, 32, "asym")[0][:3],
        quantize_gptq(weight.float(), hessian, 4, 32, "asym")[0][:3],
        strict=True,
    ):
        assert torch.equal(got, expected) and got.dtype == expected.dtype


def test_the_arguments_are_left_as_they_were():
    weight, hessian = drawn(rows=20)
    before = weight.clone(), hessian.clone()
    for options in (GPTQOptions(), GPTQOptions(act_order=False, static_groups=False)):
        quantize_gptq(weight, hessian, 3, 32, "asym", options)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("static_groups", FLAGS)
def test_clipping_finds_the_grids(static_groups):
    weight, hessian = drawn(seed=3)
    options = GPTQOptions(static_groups=static_groups)
    plain, _ = quantize_gptq(weight, hessian, 2, 64, "asym", options)
    clipped, _ = quantize_gptq(weight, hessian, 2, 64, "asym", options, clipped_qparams)
    if static_groups:
        assert (clipped.scales <= plain.scales).all()
    assert clipped.scales.float().mean() < plain.scales.float().mean() * 0.9
    errors = [output_error(restored(p, 2, 64, COLUMNS), weight, hessian) for p in (plain, clipped)]
    assert errors[1] < errors[0]


def test_a_constant_of_the_hessian_does_not_matter():
    weight, hessian = drawn(rows=20)
    whole = quantize_gptq(weight, hessian, 4, 32, "asym")[0]
    scaled = quantize_gptq(weight, hessian * 1024, 4, 32, "asym")[0]  # exact in float32
    assert torch.equal(whole.qweight, scaled.qweight)
