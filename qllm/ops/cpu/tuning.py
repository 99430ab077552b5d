"""What tunes a layer, on CPUs; see `reference` for what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.ops.cpu import library
from qllm.ops.cpu.interface import DescendBlock, StepRounding
from qllm.ops.cpu.library import TYPES, pointer
from qllm.ops.reference.rounding import FOLLOWED, KEPT, LARGEST_FACTOR, SMALLEST_FACTOR
from qllm.ops.rounding import Rounding
from qllm.quant.rtn import SMALLEST_HALF_SCALE


def step_rounding(
    state: Rounding, gradients: Tensor, rate: float, range_rate: float, matrix: Tensor
) -> Tensor:
    """`reference.step_rounding`; sums over a group are in another order.

    All but the first dimension of `gradients`, and of both factors, lies without gaps.
    """
    assert state.ideal.is_contiguous() and matrix.is_contiguous() and gradients[0].is_contiguous()
    ranges = (state.low, state.high, state.factors, state.by_factor)
    tensors = (gradients, state.ideal, state.by_ideal, *ranges)
    arguments = StepRounding(
        *matrix.shape,
        *state.ideal.shape[1:],
        state.most,
        state.symmetric,
        TYPES[state.dtype],
        TYPES[matrix.dtype],
        len(gradients),
        gradients.stride(0),
        state.factors.stride(0),
        rate,
        range_rate,
        FOLLOWED,
        KEPT,
        SMALLEST_HALF_SCALE,
        SMALLEST_FACTOR,
        LARGEST_FACTOR,
        *map(pointer, tensors),
        pointer(state.perm),
        pointer(matrix),
    )
    library.run("step_rounding", arguments, *tensors, state.perm, matrix)
    return matrix


def descend_block(
    products: Tensor,
    values: Tensor,
    gradient: Tensor,
    scales: Tensor,
    low: Tensor,
    by_step: Tensor,
    most: int,
) -> Tensor:
    """`reference.descend_block`; `products` may be a part of a larger matrix."""
    assert products.stride(1) == 1
    given = [part.contiguous() for part in (gradient, scales, low, by_step)]
    found = torch.stack((values, torch.empty_like(values)))
    values, moves = found
    tensors = (products, values, *given, moves)
    arguments = DescendBlock(*values.shape, most, products.stride(0), *map(pointer, tensors))
    library.run("descend_block", arguments, *tensors)
    return found
