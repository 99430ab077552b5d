"""Statistics of inputs against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qllm.quant import inputs
from qllm.quant.inputs import InputStats, output_error

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(channels: int, lengths=(5, 1, 30), dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    sizes = torch.randn(channels, generator=generator).exp()
    return [(torch.randn(n, channels, generator=generator) * sizes).to(dtype) for n in lengths]


def collected(parts: list[torch.Tensor], *, products: bool = True) -> InputStats:
    stats = InputStats(parts[0].shape[1], "cpu", products=products)
    for part in parts:
        stats.add(part)
    return stats


def assert_stats(stats: InputStats, x: np.ndarray) -> None:
    """They are those of inputs x (M, K), in float64."""
    assert stats.count == len(x)
    for got, expected in (
        (stats.absolute, np.abs(x).sum(axis=0)),
        (stats.largest, np.abs(x).max(axis=0)),
        (stats.mean, np.abs(x).mean(axis=0)),
        (stats.hessian, x.T @ x),
    ):
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        assert np.allclose(got.double().numpy(), expected, rtol=1e-5, atol=1e-5 * expected.max())


# Around the size from which on a matrix of products is summed in blocks.
@pytest.mark.parametrize("channels", [1, 7, 255, 256, 257, 600])
def test_against_numpy(channels):
    parts = batches(channels)
    stats = collected(parts)
    assert_stats(stats, torch.cat(parts).double().numpy())
    assert torch.allclose(stats.hessian, stats.hessian.t(), rtol=1e-5, atol=1e-5)


def test_reading_between_two_batches_changes_nothing():
    parts = batches(600)
    stats = InputStats(600, "cpu", products=True)
    for part in parts:
        stats.add(part)
        assert stats.hessian is not None and stats.mean is not None
    assert torch.equal(stats.hessian, collected(parts).hessian)


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("channels", [7, 600])
def test_divide(channels, read_before):
    parts = batches(channels)
    scales = torch.rand(channels, generator=torch.Generator().manual_seed(3)) + 0.5
    stats = collected(parts)
    if read_before:
        assert stats.hessian.isfinite().all()
    stats.divide(scales)
    assert_stats(stats, torch.cat(parts).double().numpy() / scales.double().numpy())
    assert torch.allclose(stats.hessian, stats.hessian.t(), rtol=1e-6)
    more = batches(channels, (4,))
    for part in more:
        stats.add(part)
    x = torch.cat([torch.cat(parts).double() / scales, *more])
    assert_stats(stats, x.double().numpy())


def test_without_products():
    parts = batches(7)
    stats = collected(parts, products=False)
    assert stats.hessian is None
    stats.divide(torch.full((7,), 2.0))
    assert torch.equal(stats.largest, torch.cat(parts).abs().amax(dim=0) / 2)
    assert stats.count == 36


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_summed_in_float32(dtype):
    parts = batches(7, (5, 3000), dtype)
    assert_stats(collected(parts), torch.cat(parts).double().numpy())


@pytest.mark.parametrize("rows", [4096, 3])
def test_output_error(monkeypatch, rows):
    """The squared length of E x, summed over all x."""
    monkeypatch.setattr(inputs, "ROWS", rows)
    x = torch.cat(batches(7))
    error = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
    expected = (x.double() @ error.double().t()).square().sum().item()
    before = error.clone()
    assert output_error(error, collected([x]).hessian) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(error, before)


def test_output_error_is_not_negative():
    """Where all inputs are one and the weights' error does nothing to it, rounding decides."""
    generator = torch.Generator().manual_seed(0)
    x, errors = torch.randn(64, generator=generator), torch.randn(200, 64, generator=generator)
    errors -= torch.outer(errors @ x, x) / (x @ x)
    hessian = torch.outer(x, x) * 1000
    plain = [((row @ hessian) * row).sum().item() for row in errors]
    found = [output_error(row[None], hessian) for row in errors]
    assert min(plain) < 0 and min(found) == 0
