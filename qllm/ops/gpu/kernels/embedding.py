"""Rows of a packed weight in the layout of qllm/ops/gpu/layout.py, as numbers."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.numbers import narrow


@triton.jit
def _part(words, pair, second, lane, half, WIDTH: tl.constexpr):
    """The bits that the part of a width has of values: (K,) of a block's words.

    Args:
        words: where the part begins in the block of each value.
        pair: of the lane's values in a block, from 0 to 15.
        second: whether it is a pair's second.
        half: 1 for a panel's rows from 8 on.
    """
    piece: tl.constexpr = 4 if WIDTH > 1 else 2
    fields: tl.constexpr = 16 // WIDTH
    word = half * WIDTH + pair // fields
    offs = word // piece * (32 * piece) + lane * piece + word % piece
    shift = 16 * second + pair % fields * WIDTH
    return (tl.load(words + offs) >> shift) & ((1 << WIDTH) - 1)


@triton.jit
def look_up_rows(
    index, q, scales, zeros, out, inputs, blocks, row_scales,
    BITS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, HAS_ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """(q - zero) scale, or q scale + offset, rounded to the type of out once: (n, K).

    Args:
        index: int64 (n,), rows of the weight, none of which may be outside it.
        blocks: of a row.
        row_scales: of a group: numbers from one to the next.
        PADDED: inputs that a group has room for.
        AT_ONCE: inputs of a program; the second axis of the grid is of them.
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(index + token)
    panel, inside = row // 16, row % 16
    half, lane_group = inside // 8, inside % 8
    k = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    there = k < inputs
    k = tl.where(there, k, 0)
    group = k // GROUP
    column = group * PADDED + k % GROUP
    block, unit, t = column // 128, column % 128 // 32, column % 32 // 8
    pair, second = unit * 4 + column % 8 // 2, column % 2
    lane = lane_group * 4 + t
    words = q + (panel * blocks + block) * (64 * BITS)
    value = tl.zeros([AT_ONCE], tl.int32)
    if BITS & 8:
        value = _part(words, pair, second, lane, half, 8)
    if BITS & 4:
        value = _part(words, pair, second, lane, half, 4)
    if BITS & 2:
        value |= _part(words + 64 * (BITS & 4), pair, second, lane, half, 2) << (BITS & 4)
    if BITS & 1:
        value |= _part(words + 64 * (BITS & 6), pair, second, lane, half, 1) << (BITS & 6)
    offs = group.to(tl.int64) * row_scales + panel * 16 + lane_group * 2 + half
    scale = tl.load(scales + offs).to(tl.float32)
    if OFFSETS:
        number = value.to(tl.float32) * scale + tl.load(zeros + offs).to(tl.float32)
    elif HAS_ZEROS:
        number = (value - tl.load(zeros + offs).to(tl.int32)).to(tl.float32) * scale
    else:
        number = (value - (1 << (BITS - 1))).to(tl.float32) * scale
    to = out + token * inputs + k
    tl.store(to, narrow(number, out.dtype.element_ty), mask=there)
