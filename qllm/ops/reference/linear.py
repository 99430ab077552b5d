"""Products with linear layers' weights: dense, packed, and int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qllm.quant.packing import group_width, unpack

# |q| <= 128, so 1024 products sum to at most 2^24: every partial sum is an exact float32.
EXACT_FLOAT32_TERMS = 1024
# The same in int32: 128 * 128 times one more is 2^31.
EXACT_INT32_TERMS = (1 << 17) - 1

# Of `weight_only_linear_int8`: inputs that share a scale, as in llama.cpp's and OpenVINO's way of
# doing it; and the size from which a row stays as it is (so do infinities and NaN).
INT8_BLOCK = 128
HUGE = 2.0**100

# Weights are dequantized in pieces of about this many: the temporaries stay in cache, and a
# dense copy of a layer never exists.
CHUNK_WEIGHTS = 1 << 21


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) @ weight (N, K)^T + bias (N,), in the type of x."""
    return F.linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`dense_linear` by oneDNN in float32 as well, where torch takes MKL."""
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The matrix that packed integers stand for: (q - zero) * scale, rounded to dtype once.

    With offsets in place of zero points it is q * scale + offset, in float32.

    Args:
        qweight: uint8 (N, packed_size(K, bits)), as `qllm.quant.packing` packs.
        scales: float16 or float32 (N, G).
        qzeros: uint8 (N, G), or empty for a symmetric grid with zero 2^(bits-1), or offsets, in
            the type of the scales.

    Returns:
        (N, K) in dtype.
    """
    q = unpack(qweight, bits, in_features)
    group = group_width(in_features, group_size)
    if qzeros.is_floating_point():
        weight = q.float().mul_(_per_column(scales.float(), group, in_features))
        return weight.add_(_per_column(qzeros.float(), group, in_features)).to(dtype)
    # In float16 the product of a float16 scale and an integer is rounded once, as it would be
    # from float32; bfloat16 would round the scale first.
    work = dtype if dtype == scales.dtype == torch.float16 else torch.float32
    zeros = qzeros[..., None] if qzeros.numel() else 2 ** (bits - 1)
    if in_features % group:
        zeros = _per_column(qzeros, group, in_features) if qzeros.numel() else zeros
        weight = q.to(work).sub_(zeros).mul_(_per_column(scales, group, in_features))
    else:
        weight = q.to(work).unflatten(1, (-1, group)).sub_(zeros).mul_(scales[..., None])
    return weight.reshape(q.shape).to(dtype)


def _per_column(values: Tensor, group: int, columns: int) -> Tensor:
    return values.repeat_interleave(group, dim=1)[:, :columns]


def weight_only_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """x (M, K) times the matrix that the packed integers stand for, in the type of x: (M, N)."""
    out = x.new_empty(x.shape[0], out_features)
    rows = max(1, CHUNK_WEIGHTS // x.shape[1])
    for start in range(0, len(qweight), rows):
        part = slice(start, start + rows)
        zeros = qzeros[part] if qzeros.numel() else qzeros
        weight = dequantize(
            qweight[part], scales[part], zeros, bits, group_size, x.shape[1], x.dtype
        )
        out[:, part] = F.linear(x, weight, None if bias is None else bias[part])
    return out


def weight_only_linear_int8(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`weight_only_linear` of x rounded to int8 (see `round_blocks`), multiplied in float32."""
    packed = (qweight, scales, qzeros)
    bias = None if bias is None else bias.float()
    rounded = round_blocks(x, group_size)
    return weight_only_linear(rounded, *packed, bias, out_features, bits, group_size).to(x.dtype)


def round_blocks(x: Tensor, group_size: int) -> Tensor:
    """x (M, K) as int8 would hold it, in float32.

    Each run of up to INT8_BLOCK inputs of a group has a scale, its largest value / 127. A row with
    values from HUGE on, infinities or NaN is left as it is.
    """
    values = x.float()
    rounded = torch.empty_like(values)
    columns = x.shape[1]
    group = group_width(columns, group_size)
    for first in range(0, columns, group):
        end = min(first + group, columns)
        for start in range(first, end, INT8_BLOCK):
            part = slice(start, min(start + INT8_BLOCK, end))
            steps = values[:, part].abs().amax(dim=1, keepdim=True) / 127
            steps = torch.where(steps == 0, 1.0, steps)
            rounded[:, part] = (values[:, part] / steps).round_().clamp_(-127, 127) * steps
    kept = ~(values.abs() < HUGE).all(dim=1, keepdim=True)
    return torch.where(kept, values, rounded)


class Int8Rows(NamedTuple):
    """Activations (M, K) as integers: `values` int8, times `scales` float32 (M, 1) or ().

    Attributes:
        dtype: that they had, and that a product of them gets.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def int8_linear(
    x: Tensor | Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_features: int,
) -> Tensor:
    """x (M, K) as int8 times int8 weights (N, K), summed exactly, in the type of x: (M, N).

    Args:
        x: numbers, or what `quantize_rows` makes of them.
        scales: (N,), of the weights.
        input_scale: float32 (), of x; None: one per row, from its largest value.
    """
    return _int8_linear(int8_matmul, x, qweight, scales, bias, input_scale)


def int8_linear_by_int_mm(
    x: Tensor | Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_features: int,
) -> Tensor:
    """`int8_linear` with `int_mm` for the product."""
    return _int8_linear(int_mm, x, qweight, scales, bias, input_scale)


def _int8_linear(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor | Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
) -> Tensor:
    rows = x if isinstance(x, Int8Rows) else quantize_rows(x, input_scale)
    return scale_int32(product(rows.values, qweight), rows.scales, scales, bias, rows.dtype)


def quantize_rows(x: Tensor, input_scale: Tensor | None) -> Int8Rows:
    """x (M, K) as int8, by a scale that is given, or one per row."""
    if input_scale is None:
        return Int8Rows(*quantize_per_token(x), x.dtype)
    return Int8Rows(quantize_int8(x, input_scale), input_scale, x.dtype)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row: x (M, K) to int8 (M, K) and float32 (M, 1)."""
    scales = x.abs().amax(dim=-1, keepdim=True).float() * 2 / 255
    scales = torch.where(scales == 0, 1.0, scales)
    return quantize_int8(x, scales), scales


def quantize_int8(x: Tensor, scales: Tensor) -> Tensor:
    """clamp(round(x / scale), -128, 127) as int8; `scales` float32, broadcast against x."""
    return torch.round(x.float() / scales).clamp_(-128, 127).to(torch.int8)


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 (M, K) @ weight int8 (N, K)^T, exactly: int32 (M, N), or int64 of very many inputs."""
    integers = torch.int32 if x.shape[1] <= EXACT_INT32_TERMS else torch.int64
    total = x.new_zeros(x.shape[0], weight.shape[0], dtype=integers)
    for a, b in zip(
        x.split(EXACT_FLOAT32_TERMS, 1), weight.split(EXACT_FLOAT32_TERMS, 1), strict=True
    ):
        total += (a.float() @ b.float().t()).to(integers)
    return total


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """`int8_matmul` by torch's own int8 kernel; K is 2 or more."""
    # It misreads a single row whose stride is not K (pytorch#195066); `view` sets the stride.
    return torch._int_mm(x.reshape(-1).view(x.shape), weight.t())


def scale_int32(
    total: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Integer sums (M, N) back to numbers: total * x_scales (M, 1) or () * scales (N,) + bias."""
    y = total.float().mul_(x_scales).mul_(scales.float())
    if bias is not None:
        y = y.add_(bias)
    return y.to(dtype)
