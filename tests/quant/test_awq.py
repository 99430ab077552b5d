"""AWQ's search of scales against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_rtn import exact_scale, groups_of

from qllm.config import SCHEMES
from qllm.quant import awq
from qllm.quant.awq import GRID, search_scales

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 60, 67


def drawn(seed: int = 0, tokens: int = 300, outliers: float = 30.0):
    """A weight, and the mean |x| and sum of x x^T of inputs of which a few are much larger."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    sizes = torch.ones(COLUMNS)
    sizes[torch.randperm(COLUMNS, generator=generator)[:3]] = outliers
    x = torch.randn(tokens, COLUMNS, generator=generator) * sizes
    return weight, x.abs().mean(dim=0), x.t() @ x


def candidates(mean: torch.Tensor) -> list[np.ndarray]:
    """Every s that is tried: mean |x| to the power of a ratio, about 1 in size."""
    found = []
    for step in range(GRID):
        s = np.maximum(mean.double().numpy(), 1e-4) ** (step / GRID)
        found.append(s / np.sqrt(s.max() * s.min()))
    return found


def loss(
    s: np.ndarray, weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, scheme: str
) -> float:
    """tr(E H E^T) for E = quantized(W s) / s - W, by DESIGN §3 in float64."""
    w, h = weight.double().numpy(), hessian.double().numpy()
    scaled, top = w * s, 2**bits - 1
    back = np.empty_like(scaled)
    for span in groups_of(w.shape[1], group):
        part = scaled[:, span]
        scale = exact_scale(part, bits, scheme).astype(np.float16).astype(np.float64)
        zero = np.full(len(part), 2 ** (bits - 1))
        if scheme == "asym":
            zero = np.clip(np.rint(-np.minimum(part.min(axis=1), 0) / scale), 0, top)
        scale, zero = scale[:, None], zero[:, None]
        back[:, span] = (np.clip(np.rint(part / scale) + zero, 0, top) - zero) * scale
    error = torch.from_numpy(back / s - w)
    return float(((error @ torch.from_numpy(h)) * error).sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_scales_are_the_best_of_the_grid(bits, group_size, scheme):
    weight, mean, hessian = drawn(seed=bits)
    form = (bits, group_size, scheme)
    found = search_scales(weight, mean, hessian, *form)
    assert found.shape == (COLUMNS,) and found.dtype == torch.float32
    tried = candidates(mean)
    distances = [np.abs(found.double().numpy() / s - 1).max() for s in tried]
    assert min(distances) < 1e-5
    losses = [loss(s, weight, hessian, *form) for s in tried]
    assert losses[int(np.argmin(distances))] <= min(losses) * (1 + 1e-4)
    assert min(losses) < losses[0] * 0.9  # the outliers are worth it
    assert np.argmin(distances) > 0


def test_equal_means_get_equal_scales():
    weight, mean, hessian = drawn()
    mean[10:20], mean[30:50] = 3.0, 0.2
    found = search_scales(weight, mean, hessian, 3, 16, "asym")
    assert len(found[10:20].unique()) == len(found[30:50].unique()) == 1
    assert len(found.unique()) > 20
    assert (found[10] > found[30]).all()


def test_where_no_scaling_is_best_there_is_none():
    weight, mean, _ = drawn()
    # Only the channels that scaling would make worse count.
    hessian = torch.diag((mean < mean.median()).float())
    found = search_scales(weight, mean, hessian, 3, -1, "asym")
    assert found.tolist() == [1.0] * COLUMNS


def test_without_inputs_there_are_no_scales():
    weight, _, _ = drawn()
    zero = torch.zeros(COLUMNS)
    found = search_scales(weight, zero, torch.diag(zero), 3, -1, "asym")
    assert found.tolist() == [1.0] * COLUMNS


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1, 1e15])
def test_dead_and_enormous_channels_leave_scales_finite(size):
    weight, mean, hessian = drawn()
    mean[::7] = 0
    hessian[::7], hessian[:, ::7] = 0, 0
    found = search_scales(weight, mean * size, hessian * min(size, 1e15) ** 2, 4, 16, "asym")
    assert found.isfinite().all()
    assert (found > 0).all()
    if size == 1:  # the outliers are seen all the same
        assert found.max() > 2


@pytest.mark.parametrize("rows", [1, 7, 59])
def test_the_size_of_a_piece_does_not_show(monkeypatch, rows):
    weight, mean, hessian = drawn()
    whole = search_scales(weight, mean, hessian, 3, 16, "asym")
    monkeypatch.setattr(awq, "ROWS", rows)
    assert torch.equal(search_scales(weight, mean, hessian, 3, 16, "asym"), whole)


def test_the_arguments_are_left_as_they_were():
    arguments = drawn()
    before = [tensor.clone() for tensor in arguments]
    search_scales(*arguments, 4, 16, "asym")
    assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))
