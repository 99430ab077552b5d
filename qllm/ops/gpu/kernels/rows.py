"""Rows of activations: sums, norms, and to int8, one program a row; and activation functions.

A GPU's `/` and square root are a last digit off, which a rounded result would show: here both are
rounded correctly, as the reference's are.
"""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.numbers import bound, let_next_begin, narrow, wait_for_previous


@triton.jit
def _nearest(steps):
    """int8 of numbers of its range, to the nearest integer, halves to the even one."""
    magic: tl.constexpr = 12582912.0  # 1.5 · 2^23, which leaves no bit for a fraction
    return (steps + magic).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _scale(largest):
    """That of a row, by the bits of its largest size, in whose order infinity is next to last, and
    NaN the largest number."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True) * 2, 255.0)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def _clamped(steps):
    return tl.where(steps == steps, tl.minimum(tl.maximum(steps, -128.0), 127.0), 0.0)


@triton.jit
def norm_rows(
    x, x_stride, z, z_stride, sums, weight, bias, out, scales, columns, eps, offset,
    WIDTH: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr, STATIC: tl.constexpr, RUN: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """norm(x + z), or of x alone, for (M, K); with QUANTIZE as int8, clamp(round(... / scale)).

    Args:
        sums: (M, K), takes x + z where they are added, rounded as the norm sees them.
        out: of x's type or int8.
        offset: is added to the weight.
        scales: float32, per row or given.
        WIDTH: K or the next power of two.
        NORM: 0: none, 1: layer norm, 2: root mean square; rounded to the type of x, as where it is
            stored in between.
        STATIC: scales is one number, which is read.
        RUN: rows come in runs of so many, of which the FIRST take the weight's first row, the next
            SECOND its second one, THIRD none, and the rest stay as they are; 0: all take the one
            row there is.
        LATE: it begins before the kernel in front has ended.
    """
    let_next_begin(LATE)
    wait_for_previous(LATE)
    type: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    offs = row * columns + column
    if ADD:
        value += tl.load(z + row * z_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = narrow(value, type)
        tl.store(sums + offs, total, mask=inside)
        value = total.to(tl.float32)
    before, row_in_run = value, 0
    if RUN > 0:
        row_in_run = row % RUN
        weight += tl.where(row_in_run < FIRST, 0, columns)
    if NORM != 0:
        count = columns * 1.0
        if NORM == 1:
            mean = tl.div_rn(tl.sum(value), count)
            value = tl.where(inside, value - mean, 0.0)
        variance = tl.div_rn(tl.sum(value * value), count)
        value = value * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        if HAS_WEIGHT:
            factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
            if THIRD > 0:
                factor = tl.where(row_in_run < FIRST + SECOND, factor, 1.0)
            value *= factor
        if HAS_BIAS:
            value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if RUN > 0:
            value = tl.where(row_in_run < FIRST + SECOND + THIRD, value, before)
        normed = narrow(value, type)
        value = normed.to(tl.float32)
    if QUANTIZE:
        if STATIC:
            scale = tl.load(scales)
        else:
            scale = _scale(tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF))
            tl.store(scales + row, scale)
        tl.store(out + offs, _nearest(_clamped(tl.div_rn(value, scale))), mask=inside)
    else:
        tl.store(out + offs, normed, mask=inside)


@triton.jit
def quantize_rows(
    x, x_stride, out, scales, columns, CHUNK: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """int8 of the rows of x (M, K), 16-bit numbers, by a scale for each, as `norm_rows` has it.

    It reads a row twice, CHUNK columns at a time, the second time from the cache: of many rows that
    are long, more are under way at once than fit into registers whole.

    Args:
        FUSED: divide by fused operations where this rounds as division does.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CHUNK)
    offs = row * columns
    x += row * x_stride
    largest = tl.zeros([CHUNK], tl.int32)
    for first in range(0, bound(columns), CHUNK):
        inside = first + column < columns
        value = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = _scale(tl.max(largest))
    tl.store(scales + row, scale)
    if FUSED and (scale > 2.0**-100) & (scale < 2.0**100):
        inverse = tl.div_rn(1.0, scale)
        for first in range(0, bound(columns), CHUNK):
            inside = first + column < columns
            value = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
            steps = value * inverse
            steps = tl.fma(tl.fma(-steps, scale, value), inverse, steps)
            tl.store(out + offs + first + column, _nearest(tl.minimum(steps, 127.0)), mask=inside)
    else:
        for first in range(0, bound(columns), CHUNK):
            inside = first + column < columns
            value = tl.load(x + first + column, mask=inside, other=0.0).to(tl.float32)
            steps = _clamped(tl.div_rn(value, scale))
            tl.store(out + offs + first + column, _nearest(steps), mask=inside)


@triton.jit
def activated(x, NAME: tl.constexpr):
    """One of `reference.ACTIVATIONS` of float32 x."""
    if NAME == "relu":
        y = tl.where(x < 0, 0.0, x)  # what is no number stays so
    elif NAME == "relu2":
        y = tl.where(x < 0, 0.0, x)
        y = y * y
    elif NAME == "silu":
        y = tl.div_rn(x, 1.0 + tl.exp(-x))
    elif NAME == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # x (1 + tanh u) / 2 = x / (1 + e^-2u), u being sqrt(2 / pi) (x + 0.044715 x^3)
        y = tl.div_rn(x, 1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return y


@triton.jit
def clamped_swiglu(gate, up):
    """gpt-oss's SwiGLU of float32 gate and up: `reference.gated_activation`."""
    gate = tl.where(gate > 7.0, 7.0, gate)  # what is no number stays so
    up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
    return tl.div_rn(gate, 1.0 + tl.exp(gate * -1.702)) * (up + 1.0)


@triton.jit
def activate(
    x, y, columns,
    NAME: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """y = f(x) for x (M, C); with GATED f(gate) up, f(gate) being rounded, for x (M, 2 C).

    Of "swiglu_oai" f(gate, up), of which nothing is rounded in between.
    """
    let_next_begin(LATE)
    wait_for_previous(LATE)
    type: tl.constexpr = x.dtype.element_ty
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, row = column < columns, tl.program_id(1).to(tl.int64)
    source = x + row * columns * (2 if GATED else 1) + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
        if NAME == "swiglu_oai":
            found = clamped_swiglu(first, up)
        else:
            found = narrow(activated(first, NAME), type).to(tl.float32) * up
    else:
        found = activated(first, NAME)
    tl.store(y + row * columns + column, narrow(found, type), mask=inside)
