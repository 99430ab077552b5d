"""Rows of activations to int8, one program a row."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.numbers import narrow


@triton.jit
def _round(x):
    """To the nearest integer, halves to the even one, for |x| < 2^22."""
    magic: tl.constexpr = 12582912.0  # 1.5 · 2^23, which leaves no bit for a fraction
    return (x + magic) - magic


@triton.jit
def quantize_rows(
    x, x_stride, weight, bias, q, scales, columns, eps,
    WIDTH: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    STATIC: tl.constexpr,
):  # fmt: skip
    """q = clamp(round(norm(x) / scale)): int8 (M, K), and scales float32, per row or given.

    Args:
        WIDTH: K or the next power of two.
        NORM: 0: none, 1: layer norm, 2: root mean square; rounded to the type of x, as where it is
            stored in between.
        STATIC: scales is one number, which is read.
    """
    row = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    source = x + row.to(tl.int64) * x_stride + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if NORM != 0:
        if NORM == 1:
            mean = tl.sum(value) / columns
            value = tl.where(inside, value - mean, 0.0)
        value = value * (1.0 / tl.sqrt(tl.sum(value * value) / columns + eps))
        if HAS_WEIGHT:
            value *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        value = narrow(value, x.dtype.element_ty).to(tl.float32)
    if STATIC:
        scale = tl.load(scales)
    else:
        scale = tl.max(tl.abs(value)) * 2 / 255
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(scales + row, scale)
    steps = tl.minimum(tl.maximum(tl.div_rn(value, scale), -128.0), 127.0)
    place = q + row.to(tl.int64) * columns + column
    tl.store(place, _round(steps).to(tl.int8), mask=inside)
