"""Coordinate descent: never uphill, to where no integer alone is better, and by the formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from correlated import drawn, restored
from covering import each
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm.quant.gptq import GPTQOptions, quantize_gptq
from qllm.quant.packing import PackedWeight, pack, unpack
from qllm.quant.rtn import quantize_rtn
from qllm.quantizer import descent
from qllm.quantizer.descent import descend

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 12, 70  # of which neither 16 nor 32 is a divisor


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A matrix, the sum of x x^T, and one of r x^T, of which half is linear in x."""
    weight, hessian = drawn(rows, columns, seed=seed)
    shift, _ = drawn(rows, columns, seed=seed + 1)
    return weight, hessian, 0.5 * shift @ hessian


def loss(
    packed: PackedWeight, before: PackedWeight, form, products, residuals, metric=None
) -> np.ndarray:
    """Of each row, in float64, up to what does not depend on it; with a metric, of all as one."""
    columns = len(products)
    moved = (restored(each, *form, columns).double().numpy() for each in (packed, before))
    change = np.subtract(*moved)
    half = change @ products.double().numpy() - 2 * residuals.double().numpy()
    if metric is not None:
        return ((metric.double().numpy() @ half) * change).sum()
    return (half * change).sum(-1)


def metric_of(rows: int, seed: int = 0) -> torch.Tensor:
    """A matrix that ties rows together, positive definite."""
    root = torch.randn(rows, rows, generator=torch.Generator().manual_seed(seed))
    return root @ root.t() / rows + 0.1 * torch.eye(rows)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("bits", "group_size", "scheme", "algorithm"),
    [
        (bits, *rest)
        for bits, rest in zip(
            (1, 2, 3, 4, 5, 8) * 2,
            each((-1, 16, 32), ("asym", "sym"), ("rtn", "gptq", "act-order")) * 4,
            strict=False,
        )
        if bits > 1 or rest[1] == "asym"
    ],
)
@pytest.mark.parametrize("columns", [COLUMNS, 64])
def test_no_row_is_worse_and_zeros_stay(bits, group_size, scheme, algorithm, columns, monkeypatch):
    monkeypatch.setattr(descent, "BLOCK", 9)
    monkeypatch.setattr(descent, "SPAN", 25)
    monkeypatch.setattr(descent, "WEIGHTS_AT_ONCE", 5 * columns)
    weight, products, residuals = problem(ROWS, columns)
    products[3] = products[:, 3] = residuals[:, 3] = 0.0  # an input that is always zero
    form = bits, group_size, scheme
    options = GPTQOptions(static_groups=algorithm == "gptq")
    before = (
        quantize_rtn(weight, *form)
        if algorithm == "rtn"
        else quantize_gptq(weight, products, *form, options)[0]
    )
    after = descend(before, bits, group_size, products, residuals, torch.eye(ROWS))
    found = loss(after, before, form[:2], products, residuals)
    assert (found <= 0).all() and found.sum() < 0
    assert torch.equal(after.qzeros, before.qzeros)
    assert after.scales.dtype == before.scales.dtype
    dead = 3 if before.perm is None else int((before.perm == 3).nonzero())
    integers = (unpack(p.qweight, bits, columns)[:, dead] for p in (before, after))
    assert torch.equal(*integers)


@pytest.mark.parametrize("act_order", [False, True])
def test_it_finds_the_same_again(act_order):
    """It leaves what it is given as it was."""
    weight, products, residuals = problem(ROWS, COLUMNS)
    before = quantize_gptq(weight, products, 3, 16, "asym", GPTQOptions(static_groups=act_order))[0]
    one, two = (descend(before, 3, 16, products, residuals, torch.eye(ROWS)) for _ in range(2))
    for ours, theirs in zip(one, two, strict=True):
        assert ours is theirs or torch.equal(ours, theirs)


@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_integers_are_a_minimum_by_brute_force(seed, bits, columns):
    """No other integer of one input channel is better; where channels do not correlate, no other
    integers at all."""
    weight, products, residuals = problem(2, columns, seed)
    apart = seed % 2
    if apart:
        products, residuals = products.diagonal().diag(), residuals / 8
    before = quantize_rtn(weight, bits, -1, "asym")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(descent, "ROUNDS", 1)
        patch.setattr(descent, "SWEEPS", 50)
        patch.setattr(descent._Descent, "fit_scales", lambda self: None)
        after = descend(before, bits, -1, products, residuals, torch.eye(2))
    found = loss(after, before, (bits, -1), products, residuals)
    integers = unpack(after.qweight, bits, columns)
    for other in itertools.product(range(2**bits), repeat=columns):
        row = torch.tensor(other, dtype=torch.uint8).expand(2, -1)
        least = loss(
            before._replace(qweight=pack(row.contiguous(), bits)),
            before,
            (bits, -1),
            products,
            residuals,
        )
        compared = (row != integers).sum(-1) <= (columns if apart else 1)
        slack = 1e-5 * np.abs(found) + 1e-7
        assert (found <= least + slack)[compared.numpy()].all()


def test_scales_are_those_of_least_squares(monkeypatch):
    monkeypatch.setattr(descent, "SWEEPS", 0)
    monkeypatch.setattr(descent, "ROUNDS", 1)
    monkeypatch.setattr(descent, "RIDGE", 0.0)
    weight, products, residuals = problem(ROWS, COLUMNS)
    before = quantize_rtn(weight, 4, 16, "asym")
    before = before._replace(scales=before.scales.float())
    after = descend(before, 4, 16, products, residuals / 20, torch.eye(ROWS))
    group = np.arange(COLUMNS) // 16
    integers = unpack(before.qweight, 4, COLUMNS).double().numpy()
    values = integers - before.qzeros.double().numpy()[:, group]
    # With a root of H = L L^T, the squared length of s B L - t L, where t H = W H + R.
    root = np.linalg.cholesky(products.double().numpy())
    scales = before.scales.double().numpy()
    matrix = values * scales[:, group]
    target = matrix @ root + np.linalg.solve(root, residuals.double().numpy().T / 20).T
    for row in range(ROWS):
        basis = np.stack([np.where(group == g, values[row], 0) for g in range(5)]) @ root
        expected = np.linalg.lstsq(basis.T, target[row], rcond=None)[0]
        np.testing.assert_allclose(after.scales[row].numpy(), expected, rtol=2e-3)
    assert torch.equal(after.qweight, before.qweight)


@pytest.mark.covering(1)
@pytest.mark.parametrize("scheme", ["asym", "sym"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_a_metric_ties_together_make_up_for_each_other(scheme, seed):
    weight, products, residuals = problem(40, COLUMNS, seed)
    metric, form = metric_of(40, seed), (3, 16, scheme)
    before = quantize_gptq(weight, products, *form, GPTQOptions())[0]
    with_it, without = (
        descend(before, *form[:2], products, residuals / 20, each)
        for each in (metric, torch.eye(40))
    )
    found = [
        loss(packed, before, form[:2], products, residuals / 20, metric)
        for packed in (with_it, without)
    ]
    assert found[0] < min(found[1], 0)


def test_what_does_not_lower_the_loss_is_not_taken(monkeypatch):
    """All rows at once overshoot where they are alike to the metric."""
    monkeypatch.setattr(descent, "ROW_SETS", 1)
    weight, products, residuals = problem(ROWS, COLUMNS)
    metric = 0.01 * torch.eye(ROWS) + torch.ones(ROWS, ROWS)
    before = quantize_rtn(weight, 4, 16, "asym")
    after = descend(before, 4, 16, products, residuals, metric)
    assert loss(after, before, (4, 16), products, residuals, metric) <= 0
