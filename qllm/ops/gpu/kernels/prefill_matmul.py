"""Products of a prompt with a packed weight whose numbers are rounded to the type of x first.

Each output is one sum over all of K, in steps of 16 inputs one after the other, which the matrix
units add up: for few rows weights become numbers in registers, for many they do so once, in memory,
and go to the matrix units from there. The one is the other to the bit, where a self-test says so.
"""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.matmul import (
    BLOCK,
    PANEL,
    group_of,
    rows_of_panels,
    store_sums,
    unpack_pairs,
    unpack_step,
    zeros_of,
)
from qllm.ops.gpu.kernels.numbers import INTERPRETED, bound, narrow, operand


@triton.jit
def _rounded(
    words, lane, half, scales, zeros, offs, step: tl.constexpr, type: tl.constexpr,
    BITS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, HAS_ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """A step's weights (BN, BK) as numbers, rounded to a type; inputs in their order."""
    zero = zeros_of(zeros, offs, BITS, HAS_ZEROS, OFFSETS, BN)
    scale = tl.load(scales + offs).to(tl.float32)[:, None]
    offset = tl.load(zeros + offs).to(tl.float32)[:, None] if OFFSETS else 0.0
    if INTERPRETED or type != tl.bfloat16:
        weight = unpack_step(words, lane, half, zero, step, type, BITS, BK, BN)
        weight = weight.to(tl.float32) * scale
        weight = narrow(weight + offset if OFFSETS else weight, type)
    else:  # a bfloat16 is the upper half of a float32
        pairs = unpack_pairs(words, lane, half, zero, step, type, BITS, BK, BN)
        low = (pairs << 16).to(tl.float32, bitcast=True) * scale
        high = (pairs & -65536).to(tl.float32, bitcast=True) * scale
        if OFFSETS:
            low, high = low + offset, high + offset
        weight = tl.reshape(tl.join(narrow(low, type), narrow(high, type)), (BN, BK))
    if BK == 64:  # of two units, a lane's inputs lie side by side
        weight = tl.permute(tl.reshape(weight, (BN, 4, 2, 8)), (0, 2, 1, 3))
        weight = tl.reshape(weight, (BN, 64))
    return weight


@triton.jit
def dequantize_weight(
    q, scales, zeros, weight, panels, blocks, groups,
    BITS: tl.constexpr, SPAN: tl.constexpr, GROUP_BLOCKS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN rows and a block of a weight, to (panels · PANEL, blocks · BLOCK) in the type of it."""
    type: tl.constexpr = weight.dtype.element_ty
    BK: tl.constexpr = min(SPAN, 64)  # noqa: N806
    n, block = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    panel, column, lane, half = rows_of_panels(n, panels)
    words = q + (panel.to(tl.int64) * blocks + block) * (64 * BITS)
    target = weight + n.to(tl.int64)[:, None] * blocks * BLOCK + tl.arange(0, BK)[None, :]
    for step in tl.static_range(BLOCK // BK):
        offs = group_of(block, step, groups, BK, SPAN, GROUP_BLOCKS) * panels * PANEL + column
        found = _rounded(
            words, lane, half, scales, zeros, offs, step, type, BITS, BK, BN, HAS_ZEROS, OFFSETS
        )
        where = target + (block * BLOCK + step * BK)
        tl.store(where, found, mask=(n < panels * PANEL)[:, None])


@triton.jit(do_not_specialize=["rows"])
def few_rows_matmul(
    x, x_stride, q, scales, zeros, bias, y, rows, inputs, outputs, blocks, groups,
    BITS: tl.constexpr, SPAN: tl.constexpr, GROUP_BLOCKS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias, weights becoming numbers on their way; operands as `packed_matmul` has."""
    type: tl.constexpr = x.dtype.element_ty
    BK: tl.constexpr = min(SPAN, 64)  # noqa: N806
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    panels = (outputs + PANEL - 1) // PANEL
    panel, column, lane, half = rows_of_panels(n, panels)
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    q_panel = q + panel.to(tl.int64) * blocks * (64 * BITS)
    sums = tl.zeros((BN, BM), tl.float32)
    for block in range(bound(blocks)):
        words = q_panel + block * (64 * BITS)
        for step in tl.static_range(BLOCK // BK):
            offs = group_of(block, step, groups, BK, SPAN, GROUP_BLOCKS) * panels * PANEL + column
            weight = _rounded(
                words,
                lane,
                half,
                scales,
                zeros,
                offs,
                step,
                type,
                BITS,
                BK,
                BN,
                HAS_ZEROS,
                OFFSETS,
            )
            k = block * BLOCK + step * BK + tl.arange(0, BK)
            inside = (m < rows)[:, None] & (k < inputs)[None, :]
            part = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
            sums = tl.dot(operand(weight), tl.trans(operand(part)), sums, input_precision="ieee")
    store_sums(sums, bias, y, m, n, rows, outputs, HAS_BIAS, BM, BN)


@triton.jit(do_not_specialize=["rows"])
def many_rows_matmul(
    x, weight, bias, y, rows, outputs, blocks, programs,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias. A program takes one tile after the other, those of the same rows in turn.

    Args:
        x, weight: tensor descriptors of x (M, K) and of what `dequantize_weight` makes, in blocks
            (BM, BK) and (BN, BK).
        blocks: of BK inputs.
        programs: how many there are.
    """
    down, across = (outputs + BN - 1) // BN, (rows + BM - 1) // BM
    for tile in range(bound(tl.program_id(0)), bound(down * across), bound(programs)):
        first_m, first_n = tile % across * BM, tile // across * BN
        sums = tl.zeros((BN, BM), tl.float32)
        for block in range(bound(blocks)):
            w = weight.load([first_n, block * BK])
            part = x.load([first_m, block * BK])
            sums = tl.dot(operand(w), tl.trans(operand(part)), sums, input_precision="ieee")
        m, n = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
        store_sums(sums, bias, y, m, n, rows, outputs, HAS_BIAS, BM, BN)
