"""What tunes a layer, on CPUs; see `reference` for what each computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qllm.ops.cpu import library
from qllm.ops.cpu.interface import AttendSequences, DescendBlock, StepRounding
from qllm.ops.cpu.library import TYPES, pointer
from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.reference.attention import split_heads
from qllm.ops.reference.rounding import BETA1, BETA2, LARGEST_FACTOR, SMALLEST_FACTOR
from qllm.ops.rounding import Rounding
from qllm.quant.rtn import SMALLEST_HALF_SCALE


def step_rounding(
    state: Rounding, gradients: Tensor, rate: float, range_rate: float, matrix: Tensor
) -> Tensor:
    """`reference.step_rounding`; sums over a group are in another order.

    All but the first dimension of `gradients`, and of both factors, lies without gaps.
    """
    assert state.ideal.is_contiguous() and matrix.is_contiguous() and gradients[0].is_contiguous()
    ranges = (state.low, state.high, state.factors, state.factor_exp_avg)
    tensors = (gradients, state.ideal, state.ideal_exp_avg, *ranges)
    arguments = StepRounding(
        *matrix.shape,
        *state.ideal.shape[1:],
        state.qmax,
        state.symmetric,
        TYPES[state.dtype],
        TYPES[matrix.dtype],
        len(gradients),
        gradients.stride(0),
        state.factors.stride(0),
        rate,
        range_rate,
        BETA1,
        BETA2,
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
    step_sizes: Tensor,
    qmax: int,
) -> Tensor:
    """`reference.descend_block`; `products` may be a part of a larger matrix."""
    assert products.stride(1) == 1
    given = [part.contiguous() for part in (gradient, scales, low, step_sizes)]
    found = torch.stack((values, torch.empty_like(values)))
    values, moves = found
    tensors = (products, values, *given, moves)
    arguments = DescendBlock(*values.shape, qmax, products.stride(0), *map(pointer, tensors))
    library.run("descend_block", arguments, *tensors)
    return found


def differentiable_attention(
    qkv: Tensor,
    kv: KV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.differentiable_attention`; on the way back weights are computed once more."""
    q, k, v = (part.to(qkv.dtype) for part in split_heads(qkv, kv, cos_sin))
    if slopes is not None:
        slopes = slopes.float().contiguous()
    return _Attention.apply(q, k, v, slopes, scores, batch.span).flatten(1)


class _Attention(torch.autograd.Function):
    """Causal attention of queries (N, H, D) to keys and values (N, H_kv, D) of sequences of one
    length: (N, H, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        scores: Scores,
        length: int,
    ) -> Tensor:
        q, k, v = map(_with_whole_rows, (q, k, v))
        y, stats = q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2, dtype=torch.float32)
        tensors = (q, k, v, slopes, scores.sinks, y, stats)
        ctx.save_for_backward(*tensors)
        ctx.scores, ctx.length = scores, length
        _attend_sequences("attend_sequences", tensors, scores, length)
        return y

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        saved = ctx.saved_tensors  # which checkpoints let read once
        gradients = [part.new_empty(part.shape) for part in saved[:3]]
        tensors = (*saved, grad_outputs[0].contiguous(), *gradients)
        _attend_sequences("attend_sequences_backward", tensors, ctx.scores, ctx.length)
        return gradients[0], gradients[1], gradients[2], None, None, None


def _with_whole_rows(x: Tensor) -> Tensor:
    """Tokens (N, H, D) of which each lies without gaps."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _attend_sequences(
    op: str, tensors: tuple[Tensor | None, ...], scores: Scores, length: int
) -> None:
    q, k, v = (part for part in tensors[:3] if part is not None)
    tokens, heads, dim = q.shape
    arguments = AttendSequences(
        *(tokens // length, length, heads, k.shape[1], dim, TYPES[q.dtype], scores.window),
        *(part.stride(0) for part in (q, k, v)),
        scores.factor(dim),
        scores.cap,
        *map(pointer, tensors),
    )
    library.run(op, arguments, *tensors)
