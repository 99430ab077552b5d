"""What calibration computes on GPUs, beside the reference."""

from __future__ import annotations

import pytest
import torch
from cpu_paths import normal

from qllm.ops import reference
from qllm.ops.gpu import tuning
from qllm.quantizer import descent


@pytest.mark.parametrize(
    ("channels", "rows"),
    [(1, 1), (7, 3), (40, 33), (128, 70), (tuning.MAX_CHANNELS + 1, 2)],
    ids=str,
)
def test_best_integers_are_the_reference_s(channels, rows, gpu):
    """Of parts of a larger matrix of products, and of tensors that lie apart."""
    whole = normal(channels + 5, channels + 5)
    products = whole[2 : channels + 2, 3 : channels + 3]
    values = normal(rows, channels).mul(2).round().clamp(-3, 4).t()
    gradient, scales, step_sizes = normal(3, channels, rows)
    step_sizes[0, 0] = 1e12  # beyond what an integer holds, either way
    gradient[:, -1] = -1.0
    step_sizes[:, -1] = 4e9
    if channels > 7:
        gradient[5, 0], gradient[6, 1] = torch.inf, torch.nan
    low = torch.full_like(values, -3)
    given = [products, values, gradient, scales.abs(), low, step_sizes.abs()]
    there = [part.to(gpu) for part in given]
    wanted = reference.descend_block(*given, 7)
    # A part that is moved is a matrix of its own.
    there[0] = whole.to(gpu)[2 : channels + 2, 3 : channels + 3]
    found = tuning.descend_block(*there, 7).cpu()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert channels == 1 or (found[0] != values).any()


def test_halves_go_to_the_even_integer(gpu):
    products, one = torch.zeros(1, 1), torch.ones(1, 8)
    gradient = torch.arange(-4, 4).view(1, -1) + 0.5
    given = [products, torch.zeros(1, 8), gradient, one, -8 * one, one]
    found = tuning.descend_block(*[part.to(gpu) for part in given], 15).cpu()
    assert found[0].tolist() == [[4, 2, 2, 0, 0, -2, -2, -4]]


def test_the_quantizer_s_blocks_are_the_kernel_s():
    assert descent.BLOCK <= tuning.MAX_CHANNELS
