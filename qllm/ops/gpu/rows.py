"""Rows of activations as int8, with the norm in front where there is one; and gated ones."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import device
from qllm.ops.reference import Int8Rows

NO_NORM, LAYER_NORM, RMS_NORM = range(3)
GATED_AT_ONCE = 1024  # columns that a program takes


def side_by_side(x: Tensor) -> Tensor:
    """x (M, K) with the columns of a row without gaps; rows may lie apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def quantize(x: Tensor, input_scale: Tensor | None) -> Int8Rows:
    """`reference.quantize_rows`."""
    return _quantize(x, NO_NORM, None, None, 0.0, input_scale)


def layer_norm_int8(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, input_scale: Tensor | None
) -> Int8Rows:
    """`reference.layer_norm_int8`."""
    return _quantize(x, LAYER_NORM, weight, bias, eps, input_scale)


def rms_norm_int8(
    x: Tensor, weight: Tensor | None, eps: float, input_scale: Tensor | None
) -> Int8Rows:
    """`reference.rms_norm_int8`."""
    return _quantize(x, RMS_NORM, weight, None, eps, input_scale)


def _quantize(
    x: Tensor,
    norm: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    input_scale: Tensor | None,
) -> Int8Rows:
    from qllm.ops.gpu.kernels.rows import quantize_rows

    x = side_by_side(x)
    rows, columns = x.shape
    q = x.new_empty(rows, columns, dtype=torch.int8)
    scales = input_scale
    if scales is None:
        scales = x.new_empty(rows, 1, dtype=torch.float32)
    width = 1 << (columns - 1).bit_length()
    if rows:
        with device.current(x):
            quantize_rows[(rows,)](
                x,
                x.stride(0),
                weight,
                bias,
                q,
                scales,
                columns,
                eps,
                WIDTH=width,
                NORM=norm,
                HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None,
                STATIC=input_scale is not None,
                num_warps=min(16, max(1, width // 512)),
                enable_fp_fusion=False,  # each step is rounded, as the reference's are
            )
    return Int8Rows(q, scales, x.dtype)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """`reference.gated_activation`; in one launch, where it is what Llama has."""
    from qllm.ops.gpu.kernels.rows import gated_silu

    if name != "silu":
        return reference.gated_activation(x, name)
    rows, columns = len(x), x.shape[1] // 2
    y = x.new_empty(rows, columns)
    if rows:
        with device.current(x):
            grid = (-(-columns // GATED_AT_ONCE), rows)
            gated_silu[grid](x.contiguous(), y, columns, BLOCK=GATED_AT_ONCE, num_warps=4)
    return y
