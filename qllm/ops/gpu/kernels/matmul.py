"""Products of few or many rows x (M, K) with a weight (N, K), in tiles (N, M).

The weight is the first operand of each tile's product, so that its 64 or more rows fill the matrix
units even where there is one row of x. K is cut into SPLIT_K parts of whole blocks: with PARALLEL
each is a program's (a CTA's), and the last program to finish adds them up; without, one program
takes them in turn.
Either way a part is summed block by block from zero, and parts are added in their order: M, which
decides between the two, changes no bit of a result.
"""

import triton
import triton.language as tl

from qllm.ops.gpu import layout
from qllm.ops.gpu.kernels.numbers import INTERPRETED, bound, narrow, operand

PANEL, BLOCK = tl.constexpr(layout.PANEL), tl.constexpr(layout.BLOCK)


@triton.jit
def _and_or(a, mask: tl.constexpr, c):
    """(a & mask) | c in one instruction, which the compiler does not find by itself."""
    if INTERPRETED:
        result = (a & mask) | c
    else:
        asm: tl.constexpr = "lop3.b32 $0, $1, $2, $3, 0xEA;"
        result = tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, mask, c], tl.int32, True, 1)
    return result


@triton.jit
def _rotate_right(a, by):
    """a with its bits moved down, those that fall out coming in at the top."""
    if INTERPRETED:
        bits = a.to(tl.uint32, bitcast=True)
        result = ((bits >> by) | (bits << ((32 - by) & 31))).to(tl.int32, bitcast=True)
    else:
        asm: tl.constexpr = "shf.r.wrap.b32 $0, $1, $1, $2;"
        result = tl.inline_asm_elementwise(asm, "=r,r,r", [a, by], tl.int32, True, 1)
    return result


@triton.jit
def _part(
    q, lane, half, before, step: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr,
    P: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bits [LOW, LOW + P) of a step's values, in pairs, and `before`: int32 (BN, BK / 2)."""
    words: tl.constexpr = max(1, BK * P // 128)  # of a lane
    fields: tl.constexpr = BK // 8 // words  # of a word
    mask: tl.constexpr = ((1 << P) - 1) * 0x10001 << LOW
    piece: tl.constexpr = min(4, 2 * P)  # words that lie together
    # Parts lie one after the other, the widest first.
    start: tl.constexpr = (BITS & ~(2 * P - 1)) * 64
    word = half[:, None] * P + step * BK * P // 128 + tl.arange(0, words)[None, :]
    column = word // piece * (32 * piece) + word % piece
    ptrs = q[:, None, None] + (lane[:, :, None] * piece + start + column[:, None, :])
    first: tl.constexpr = step * BK // 8 % (16 // P)
    shifts = ((first + tl.arange(0, fields)) * P - LOW) & 31
    pairs = _rotate_right(tl.load(ptrs)[:, :, :, None], shifts[None, None, None, :])
    return _and_or(tl.reshape(pairs, (BN, BK // 2)), mask, before)


@triton.jit
def _pairs(
    q, lane, half, base, step: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr
):
    """The values of BN rows in a step, in pairs, and base: int32 (BN, BK / 2).

    The second of a pair is 16 bits higher.
    """
    pairs = tl.full((BN, BK // 2), base, tl.int32)
    if BITS & 8:
        pairs = _part(q, lane, half, pairs, step, BITS, 0, 8, BK, BN)
    if BITS & 4:
        pairs = _part(q, lane, half, pairs, step, BITS, 0, 4, BK, BN)
    if BITS & 2:
        pairs = _part(q, lane, half, pairs, step, BITS, BITS & 4, 2, BK, BN)
    if BITS & 1:
        pairs = _part(q, lane, half, pairs, step, BITS, BITS & 6, 1, BK, BN)
    return pairs


@triton.jit
def _apart(pairs, type: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Pairs (BN, BK / 2) of 16-bit values as (BN, BK)."""
    both = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(both, (BN, BK)).to(type, bitcast=True)


@triton.jit
def _add_pairs(a, b, type: tl.constexpr):
    """Sums of two pairs of 16-bit numbers, two to an instruction."""
    if type == tl.float16:
        one: tl.constexpr = 0x3C003C00
        asm: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
    else:
        one: tl.constexpr = 0x3F803F80
        asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [a, one, b], tl.int32, True, 1)


@triton.jit
def unpack_pairs(
    q, lane, half, zero, step: tl.constexpr, type: tl.constexpr, BITS: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q - zero of BN rows in a step as pairs of a 16-bit type, exactly: int32 (BN, BK / 2)."""
    # An integer, put into the lowest bits of a power of two's fraction, makes their sum.
    if type == tl.float16:  # 1024 + q, for ten bits
        pairs = _pairs(q, lane, half, 0x64006400, step, BITS, BK, BN)
        minus = (zero | 0xE400) * 0x10001
    elif BITS < 8:  # 128 + q, for seven bits
        pairs = _pairs(q, lane, half, 0x43004300, step, BITS, BK, BN)
        minus = (zero | 0xC300) * 0x10001
    else:  # 128 + the lower seven bits, less 128 where the eighth is not set
        pairs = _pairs(q, lane, half, 0, step, BITS, BK, BN)
        eighth = ((~pairs >> 7) & 0x00010001) * 0xC300
        pairs = _add_pairs(_and_or(pairs, 0x007F007F, 0x43004300), eighth, type)
        minus = (-zero.to(tl.float32)).to(type).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        minus = minus * 0x10001
    return _add_pairs(pairs, minus[:, None], type)


@triton.jit
def unpack_step(
    q, lane, half, zero, step: tl.constexpr, type: tl.constexpr, BITS: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q - zero of BN rows in a step as numbers, exactly: (BN, BK), zero int32 (BN,)."""
    if INTERPRETED or type == tl.float32:
        values = _apart(_pairs(q, lane, half, 0, step, BITS, BK, BN), tl.int16, BN, BK)
        weight = values.to(tl.float32) - zero.to(tl.float32)[:, None]
    else:
        pairs = unpack_pairs(q, lane, half, zero, step, type, BITS, BK, BN)
        weight = _apart(pairs, type, BN, BK)
    return weight


@triton.jit
def _total(total, partials, counters, SPLIT_K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    """Keep a part's sum of a tile; the program that comes last gets those of all, and True."""
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    cells = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    ptrs = partials + tile.to(tl.int64) * (SPLIT_K * BN * BM) + cells
    tl.store(ptrs + tl.program_id(2) * (BN * BM), total)
    tl.debug_barrier()  # all threads have stored before one of them says so
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counters + tile, 0)  # for the next launch
        total = tl.load(ptrs, cache_modifier=".cg")
        for s in tl.static_range(1, SPLIT_K):
            total += tl.load(ptrs + s * (BN * BM), cache_modifier=".cg")
    return total, last


@triton.jit
def store_sums(
    total, bias, y, m, n, rows, outputs, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Sums (BN, BM) with their bias to y (M, N)."""
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    ptrs = y + m.to(tl.int64)[None, :] * outputs + n[:, None]
    inside = (n < outputs)[:, None] & (m < rows)[None, :]
    tl.store(ptrs, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit
def group_of(
    block, step: tl.constexpr, groups, BK: tl.constexpr, SPAN: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The group that a step of a block is in; behind the last one, where x is 0, the last one."""
    if SPAN == BLOCK:
        group = block // GROUP_BLOCKS
    else:
        group = tl.minimum(block * (BLOCK // SPAN) + step * BK // SPAN, groups - 1)
    return group


@triton.jit
def zeros_of(
    zeros, offs, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr, OFFSETS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """The zeros of BN rows."""
    if HAS_ZEROS:
        zero = tl.load(zeros + offs).to(tl.int32)
    elif OFFSETS:
        zero = tl.zeros((BN,), tl.int32)
    else:
        zero = tl.full((BN,), 1 << (BITS - 1), tl.int32)
    return zero


@triton.jit
def rows_of_panels(n, panels):
    """Panels, places of the scales, lanes' first words and halves of outputs (BN,).

    The last tile may reach beyond the last panel: there it reads that one again.
    """
    panel, half = tl.minimum(n // PANEL, panels - 1), n // 8 % 2
    lane = (n % 8 * 4)[:, None] + tl.arange(0, 4)[None, :]
    return panel, panel * PANEL + n % 8 * 2 + half, lane, half


@triton.jit
def with_offset(weight, scales, offsets, offs):
    """Integers (BN, BK) times scales plus offsets, in float32.

    The integers alone, their offsets being added to sums, would give other infinities.
    """
    scale = tl.load(scales + offs).to(tl.float32)
    offset = tl.load(offsets + offs).to(tl.float32)
    return weight.to(tl.float32) * scale[:, None] + offset[:, None]


@triton.jit
def unpack_weight(
    q, scales, zeros, unpacked, panels, blocks, groups,
    BITS: tl.constexpr, SPAN: tl.constexpr, GROUP_BLOCKS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    OFFSETS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q - zero of BN rows and a block (with OFFSETS q · scale + offset), each step's lanes in turn.

    It goes to `unpacked`, (panels · PANEL, blocks · BLOCK).
    See `packed_matmul`, whose UNPACKED reads it.
    """
    type: tl.constexpr = unpacked.dtype.element_ty
    BK: tl.constexpr = min(SPAN, 64)  # noqa: N806
    n, block = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    panel, column, lane, half = rows_of_panels(n, panels)
    q_block = q + (panel.to(tl.int64) * blocks + block) * (64 * BITS)
    target = unpacked + n.to(tl.int64)[:, None] * blocks * BLOCK + tl.arange(0, BK)[None, :]
    for step in tl.static_range(BLOCK // BK):
        group = group_of(block, step, groups, BK, SPAN, GROUP_BLOCKS)
        scale_offs = group * panels * PANEL + column
        zero = zeros_of(zeros, scale_offs, BITS, HAS_ZEROS, OFFSETS, BN)
        weight = unpack_step(q_block, lane, half, zero, step, type, BITS, BK, BN)
        if OFFSETS:
            weight = with_offset(weight, scales, zeros, scale_offs)
        ptrs = target + (block * BLOCK + step * BK)
        tl.store(ptrs, narrow(weight, type), mask=(n < panels * PANEL)[:, None])


@triton.jit(do_not_specialize=["rows"])
def packed_matmul(  # noqa: PLR0912 - one launch
    x, x_stride, q, scales, zeros, bias, y, partials, counters, rows, inputs, outputs, blocks,
    groups, BITS: tl.constexpr, SPAN: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    HAS_ZEROS: tl.constexpr, OFFSETS: tl.constexpr, UNPACKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT_K: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias, for W packed as in `qllm.ops.gpu.layout`.

    SPAN inputs of a block share a scale, which multiplies their sum: the products are of numbers as
    they are, integers times x; with OFFSETS, of dequantized ones, and no scale is left. They are
    taken in steps of up to 64 inputs, so that registers hold no more of the weight than that; in a
    step the lanes' inputs come one after the other, as the weight's words have them.

    Args:
        q: int32 (panels, blocks, 64 · BITS); UNPACKED: what `unpack_weight` makes of it, by which
            the same numbers are multiplied in the same order.
        scales, zeros: (groups, panels · PANEL).
    """
    type: tl.constexpr = x.dtype.element_ty
    BK: tl.constexpr = min(SPAN, 64)  # noqa: N806
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    panels = (outputs + PANEL - 1) // PANEL
    panel, column, lane, half = rows_of_panels(n, panels)
    i = tl.arange(0, BK)
    order = i % (BK // 4) // 8 * 32 + i // (BK // 4) * 8 + i % 8  # unit, lane, input
    order = tl.max_contiguous(tl.multiple_of(order, 8), 8)
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    q_panel = q + panel.to(tl.int64) * blocks * (64 * BITS)
    stored = tl.minimum(n, panels * PANEL - 1).to(tl.int64) * blocks * BLOCK
    per_split = (blocks + SPLIT_K - 1) // SPLIT_K
    first = tl.program_id(2) if PARALLEL else 0
    past = first + 1 if PARALLEL else SPLIT_K
    total = tl.zeros((BN, BM), tl.float32)
    for s in range(bound(first), bound(past)):
        sums = tl.zeros((BN, BM), tl.float32)
        for block in range(bound(s * per_split), bound(tl.minimum(blocks, (s + 1) * per_split))):
            for step in tl.static_range(BLOCK // BK):
                if step * BK % SPAN == 0:
                    group = group_of(block, step, groups, BK, SPAN, GROUP_BLOCKS)
                    offs = group * panels * PANEL + column
                    if not OFFSETS:
                        scale = tl.load(scales + offs).to(tl.float32)
                    product = tl.zeros((BN, BM), tl.float32)
                if UNPACKED:
                    here = block * BLOCK + step * BK + i
                    weight = tl.load(q + stored[:, None] + here[None, :])
                else:
                    zero = zeros_of(zeros, offs, BITS, HAS_ZEROS, OFFSETS, BN)
                    words = q_panel + block * (64 * BITS)
                    weight = unpack_step(words, lane, half, zero, step, type, BITS, BK, BN)
                    if OFFSETS:
                        weight = narrow(with_offset(weight, scales, zeros, offs), type)
                k = block * BLOCK + step * BK + order
                inside = (m < rows)[:, None] & (k < inputs)[None, :]
                part = tl.trans(operand(tl.load(x_rows + k[None, :], mask=inside, other=0.0)))
                product = tl.dot(operand(weight), part, product, input_precision="ieee")
                if (step + 1) * BK % SPAN == 0:
                    if OFFSETS:
                        sums += product
                    else:
                        sums += product * scale[:, None]
        total = total + sums if SPLIT_K > 1 and not PARALLEL else sums
    last = True
    if PARALLEL:
        total, last = _total(total, partials, counters, SPLIT_K, BN, BM)
    if last:
        store_sums(total, bias, y, m, n, rows, outputs, HAS_BIAS, BM, BN)


@triton.jit(do_not_specialize=["rows"])
def dense_matmul(
    x, x_stride, weight, bias, y, partials, counters, rows, inputs, outputs,
    BK: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLIT_K: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias, for W (N, K) of x's type."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    w_rows = weight + n.to(tl.int64)[:, None] * inputs
    blocks = (inputs + BK - 1) // BK
    per_split = (blocks + SPLIT_K - 1) // SPLIT_K
    first = tl.program_id(2) if PARALLEL else 0
    past = first + 1 if PARALLEL else SPLIT_K
    total = tl.zeros((BN, BM), tl.float32)
    for s in range(bound(first), bound(past)):
        sums = tl.zeros((BN, BM), tl.float32)
        for block in range(bound(s * per_split), bound(tl.minimum(blocks, (s + 1) * per_split))):
            k = block * BK + tl.arange(0, BK)
            within = (k < inputs)[None, :]
            part = tl.load(x_rows + k[None, :], mask=(m < rows)[:, None] & within, other=0.0)
            w = tl.load(w_rows + k[None, :], mask=(n < outputs)[:, None] & within, other=0.0)
            sums = tl.dot(operand(w), tl.trans(operand(part)), sums, input_precision="ieee")
        total = total + sums if SPLIT_K > 1 and not PARALLEL else sums
    last = True
    if PARALLEL:
        total, last = _total(total, partials, counters, SPLIT_K, BN, BM)
    if last:
        store_sums(total, bias, y, m, n, rows, outputs, HAS_BIAS, BM, BN)


@triton.jit(do_not_specialize=["rows"])
def int8_matmul(
    x, x_scales, weight, scales, bias, y, partials, counters, rows, inputs, outputs,
    BK: tl.constexpr, PER_ROW: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SPLIT_K: tl.constexpr, PARALLEL: tl.constexpr,
):  # fmt: skip
    """y = (x W^T) · x_scales · scales + bias, for int8 x (M, K) and W (N, K), summed exactly.

    Args:
        x_scales: float32, one per row of x with PER_ROW, else one for all.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    x_rows = x + m.to(tl.int64)[:, None] * inputs
    w_rows = weight + n.to(tl.int64)[:, None] * inputs
    blocks = (inputs + BK - 1) // BK
    per_split = (blocks + SPLIT_K - 1) // SPLIT_K
    first = tl.program_id(2) * per_split if PARALLEL else 0
    total = tl.zeros((BN, BM), tl.int32)
    end = tl.minimum(blocks, first + per_split) if PARALLEL else blocks
    for block in range(bound(first), bound(end)):
        k = block * BK + tl.arange(0, BK)
        within = (k < inputs)[None, :]
        part = tl.load(x_rows + k[None, :], mask=(m < rows)[:, None] & within, other=0)
        w = tl.load(w_rows + k[None, :], mask=(n < outputs)[:, None] & within, other=0)
        total = tl.dot(w, tl.trans(part), total, out_dtype=tl.int32)
    last = True
    if PARALLEL:
        total, last = _total(total, partials, counters, SPLIT_K, BN, BM)
    if last:
        by_row = tl.load(x_scales + m, mask=m < rows, other=0.0) if PER_ROW else tl.load(x_scales)
        scale = tl.load(scales + n, mask=n < outputs, other=0.0).to(tl.float32)
        out = total.to(tl.float32) * (by_row[None, :] if PER_ROW else by_row) * scale[:, None]
        store_sums(out, bias, y, m, n, rows, outputs, HAS_BIAS, BM, BN)
