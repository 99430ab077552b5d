"""Coordinate descent on the integers of some channels; see `reference.descend_block`."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.numbers import bound


@triton.jit
def descend_block(
    products, values, gradient, scales, low, step_sizes, out, channels, rows, stride, qmax,
    CHANNELS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program takes all channels of BN rows, whose gradient stays in registers.

    Args:
        products: float32 (k, k), with rows of `stride`.
        values, gradient, scales, low, step_sizes: float32 (k, n).
        out: (2, k, n).
        CHANNELS: a power of two that is not below k.
    """
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    channel = tl.arange(0, CHANNELS)
    here = row < rows
    known = (channel < channels)[:, None] & here[None, :]
    left = tl.load(gradient + channel[:, None] * rows + row[None, :], mask=known, other=0.0)
    magic: tl.constexpr = 12582912.0  # 1.5 · 2^23, which leaves no bit for a fraction
    for i in range(bound(channels)):
        at = i * rows + row
        value = tl.load(values + at, mask=here, other=0.0)
        least = tl.load(low + at, mask=here, other=0.0)
        own = tl.sum(tl.where(channel[:, None] == i, left, 0.0), axis=0)
        step = own * tl.load(step_sizes + at, mask=here, other=0.0)
        # Numbers that are too large for it are beyond all integers that there are, either way.
        best = value - step + magic - magic
        best = tl.maximum(best, least, propagate_nan=tl.PropagateNan.ALL)
        best = tl.minimum(best, least + qmax, propagate_nan=tl.PropagateNan.ALL)
        move = (best - value) * tl.load(scales + at, mask=here, other=0.0)
        tl.store(out + at, best, mask=here)
        tl.store(out + channels * rows + at, move, mask=here)
        column = tl.load(products + i * stride + channel, mask=channel < channels, other=0.0)
        left += column[:, None] * move[None, :]
