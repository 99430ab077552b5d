"""Coordinate descent on the integers of some channels of a matrix, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def descend_block(
    products: Tensor,
    values: Tensor,
    gradient: Tensor,
    scales: Tensor,
    low: Tensor,
    step_sizes: Tensor,
    qmax: int,
) -> Tensor:
    """Give k input channels of n rows their best integers, each with those in front as they became.

    Args:
        products: float32 (k, k), what a move of one channel adds to the gradient of another.
        values: float32 (k, n), integers less their zeros.
        gradient: (k, n), with all other channels as they are now.
        scales: (k, n).
        low: (k, n), the least integers, of qmax + 1.
        step_sizes: (k, n), what times a gradient is a step.

    Returns:
        the integers, and what that adds to the matrix: (2, k, n).
    """
    gradient, high = gradient.clone(), low + qmax
    found = torch.stack((values, torch.empty_like(values)))
    values, moves = found
    for i, row in enumerate(products):
        best = (values[i] - gradient[i] * step_sizes[i]).round()
        best = best.maximum(low[i]).minimum(high[i])
        moves[i] = (best - values[i]) * scales[i]
        values[i] = best
        gradient[i + 1 :] += row[i + 1 :, None] * moves[i]
    return found
