"""A step of roundings and ranges against the signs of their gradients (SignRound, Cheng et al.
2023), where a moving average says which way those go (Lion, Chen et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.ops.rounding import Rounding

# Of Lion: what a step leaves of the average that it follows, and of the one that it hands on.
BETA1, BETA2 = 0.9, 0.975
# Of the ends of a range; a range of nothing would have no scale.
SMALLEST_FACTOR, LARGEST_FACTOR = 0.1, 1.2


def step_rounding(
    state: Rounding, gradients: Tensor, rate: float, range_rate: float, matrix: Tensor
) -> Tensor:
    """Move a matrix (N, K) on its grids against the signs of the gradient.

    Args:
        state: takes the step.
        gradients: (P, N, K), whose sum is that of the loss by the matrix.
        rate: by how much offsets move, in steps of the grid.
        range_rate: by how much the factors do.
        matrix: (N, K), takes what the integers stand for behind that.

    Returns:
        the matrix.
    """
    grad_value = state.grouped(gradients.sum(0, dtype=torch.float32))
    scales, zeros = state.grid()
    steps = state.ideal / scales
    nearest = steps.round()
    integers = nearest.clamp(-zeros, state.qmax - zeros)
    # What is clamped has no gradient.
    grad_ideal = nearest.eq_(integers).mul_(grad_value)
    # With s = (h - l) / qmax, z = -l / s and l and h the ends times their factors, a value is
    # s (q - z): where it is not clamped it follows w, so that its derivative by s is q - z - w / s
    # and none by z; where it is, they are q - z and -s.
    grad_scale = integers.mul_(grad_value).sum(-1) - steps.mul_(grad_ideal).sum(-1)
    grad_zero = (grad_ideal.sum(-1) - grad_value.sum(-1)).mul_(scales[..., 0])
    move = _direction(state.ideal_exp_avg, grad_ideal).mul_(scales)
    state.ideal.sub_(move, alpha=rate)
    _step_ranges(state, scales[..., 0], (grad_scale, grad_zero), range_rate)
    state.dequantize(matrix)
    return matrix


def _step_ranges(
    state: Rounding, scale: Tensor, gradients: tuple[Tensor, Tensor], rate: float
) -> None:
    """Move the factors, given gradients by scale and by zero: (N, G) each."""
    grad_scale, grad_zero = gradients
    grad_scale += grad_zero * state.low * state.factors[0] / scale.square()
    ends = torch.stack((-grad_scale * state.low / state.qmax - grad_zero * state.low / scale,
                        grad_scale * state.high / state.qmax))  # fmt: skip
    if state.symmetric:
        ends = ends.sum(0, keepdim=True).expand_as(ends)
    move = _direction(state.factor_exp_avg, ends)
    state.factors.sub_(move, alpha=rate).clamp_(SMALLEST_FACTOR, LARGEST_FACTOR)


def _direction(average: Tensor, gradient: Tensor) -> Tensor:
    """The signs to go against; takes the gradient into the average."""
    move = torch.lerp(gradient, average, BETA1).sign_()
    average.lerp_(gradient, 1 - BETA2)
    return move
