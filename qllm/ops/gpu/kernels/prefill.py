"""Attention of runs of tokens to those before them in the cache and to themselves."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.attention import in_base_2, load_heads, no_softmax, soften
from qllm.ops.gpu.kernels.codes import RUN
from qllm.ops.gpu.kernels.numbers import bound, narrow, operand


@triton.jit
def new_heads(
    source, cos, sin, token, kv_heads, column, mask, DIM: tl.constexpr, FIRST: tl.constexpr,
    ROTATE: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """Keys, rotated, and values of a token: (KV_HEADS, WIDTH) each."""
    cos_sin = (cos + token * DIM, sin + token * DIM) if ROTATE else (source, source)
    k = load_heads(source, column, mask, cos_sin, DIM, FIRST, ROTATE, type)
    return k, tl.load(source + kv_heads * DIM + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["capacity"])
def write_tokens(
    qkv, cos, sin, rows, starts, positions, keys, values, heads, kv_heads, capacity,
    DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Put keys and values of a token of a sequence into the cache: a program's work.

    Keys are rotated. Heads of keys are padded to KV_HEADS, their columns to WIDTH.

    Args:
        qkv: (N, (H + 2 H_kv) D).
        cos, sin: (N, D).
        rows: int64 (B,), of the cache.
        starts: int64 (B + 1,), of sequences among the N tokens.
        positions: int64 (N,).
        keys, values: (R, H_kv, capacity, D), a token at its position modulo capacity.
    """
    type: tl.constexpr = qkv.dtype.element_ty
    sequence = tl.program_id(1)
    token = tl.load(starts + sequence) + tl.program_id(0)
    if token >= tl.load(starts + sequence + 1):
        return
    head, column = tl.arange(0, KV_HEADS), tl.arange(0, WIDTH)
    mask = (head < kv_heads)[:, None] & (column < DIM)[None, :]
    source = qkv + token * (heads + 2 * kv_heads) * DIM + ((heads + head) * DIM)[:, None]
    row, held = tl.load(rows + sequence), tl.load(positions + token) % capacity
    target = (((row * kv_heads + head) * capacity + held) * DIM)[:, None] + column[None, :]
    k, v = new_heads(source, cos, sin, token, kv_heads, column, mask, DIM, FIRST, ROTATE, type)
    tl.store(keys + target, k, mask=mask)
    tl.store(values + target, v, mask=mask)


@triton.jit
def _load_tokens(
    source, row, n, known, column, DIM: tl.constexpr, WIDTH: tl.constexpr,
    DESCRIBED: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Keys or values (BN, WIDTH) of tokens, zeros in place of those that are not known.

    Args:
        source: a pointer to rows (…, D), or with DESCRIBED a descriptor of blocks (BN, WIDTH).
        ALL: all of them are known.
    """
    if DESCRIBED:
        found = operand(source.load([row.to(tl.int32), 0]))
        if not ALL:
            found = tl.where(known[:, None], found, tl.zeros_like(found))
    else:
        there = source + row * DIM + (n * DIM)[:, None] + column[None, :]
        if not ALL:
            found = tl.load(there, mask=known[:, None] & (column < DIM)[None, :], other=0.0)
        elif DIM == WIDTH:
            found = tl.load(there)
        else:
            found = tl.load(there, mask=(column < DIM)[None, :], other=0.0)
        found = operand(found)
    return found


@triton.jit
def _attend_to_all(
    queries, sources, span, position, how, state, BN: tl.constexpr, SLOPE: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """Queries (BM, WIDTH) attend to keys, in blocks of BN, all of which they see.

    The scores of a block are made before the weights of the one in front are used: the matrix units
    sum values while exponentials are taken.

    Args:
        sources: descriptors of keys and values in blocks (BN, WIDTH), the row of a sequence's first
            token, and a capacity modulo which tokens lie at their positions with WINDOW.
        span: the first of the positions of keys, and their end.
        position: (BM,) of the queries.
        how: scale, cap, window, and slope.
        state: the largest score of each query so far, the sum of weights, that of weighed values.
    """
    keys, values, base, capacity = sources
    first, end = span
    scale, cap, _, slope = how
    m_i, l_i, acc = state
    n = tl.arange(0, BN)
    if first < end:
        # With a window, a block is in whole runs of tokens, which lie together.
        row = base + (first % capacity if WINDOW else first)
        k = operand(keys.load([row.to(tl.int32), 0]))
        products = tl.dot(queries, tl.trans(k), input_precision="ieee")
        for start in range(bound(first + BN), bound(end), BN):
            distance = (start - BN + n)[None, :] - position[:, None]
            scores, factor = in_base_2(products, scale, cap, slope, distance, CAP, SLOPE)
            weights, alpha, found = soften(scores, factor, (m_i, l_i))
            m_i, l_i = found
            weights = operand(narrow(weights, type))
            row = base + (start % capacity if WINDOW else start)
            k = operand(keys.load([row.to(tl.int32), 0]))
            products = tl.dot(queries, tl.trans(k), input_precision="ieee")
            before = start - BN
            row = base + (before % capacity if WINDOW else before)
            v = operand(values.load([row.to(tl.int32), 0]))
            acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
        before = end - BN
        row = base + (before % capacity if WINDOW else before)
        distance = (before + n)[None, :] - position[:, None]
        scores, factor = in_base_2(products, scale, cap, slope, distance, CAP, SLOPE)
        weights, alpha, found = soften(scores, factor, (m_i, l_i))
        m_i, l_i = found
        weights = operand(narrow(weights, type))
        v = operand(values.load([row.to(tl.int32), 0]))
        acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
    return m_i, l_i, acc


@triton.jit
def _attend(
    queries, sources, span, position, how, state,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, SLOPE: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, DESCRIBED: tl.constexpr, ALL: tl.constexpr,
    type: tl.constexpr,
):  # fmt: skip
    """The same to keys of which a query sees those up to its own, and in its WINDOW.

    Args:
        sources: with DESCRIBED as there, else with pointers to keys and values.
        ALL: it sees all of them.
    """
    keys, values, base, capacity = sources
    first, end = span
    scale, cap, window, slope = how
    m_i, l_i, acc = state
    n, column = tl.arange(0, BN), tl.arange(0, WIDTH)
    for start in range(bound(first), bound(end), BN):
        token = start + n
        row = base + (start % capacity if WINDOW else start)
        known = token < end
        # Keys that are not known are not seen, either.
        k = _load_tokens(keys, row, n, known, column, DIM, WIDTH, DESCRIBED, DESCRIBED or ALL)
        products = tl.dot(queries, tl.trans(k), input_precision="ieee")
        distance = token[None, :] - position[:, None]
        scores, factor = in_base_2(products, scale, cap, slope, distance, CAP, SLOPE)
        if not ALL:
            seen = distance <= 0
            if WINDOW:
                seen = seen & (distance > -window)
            scores = tl.where(seen, scores, float("-inf"))
        weights, alpha, found = soften(scores, factor, (m_i, l_i))
        m_i, l_i = found
        v = _load_tokens(values, row, n, known, column, DIM, WIDTH, DESCRIBED, ALL)
        weights = operand(narrow(weights, type))
        acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["capacity", "slots", "first_sequence"])
def prefill_attention(
    qkv, cos, sin, keys, values, own_keys, own_values, slopes, sinks, rows, starts, positions, y,
    heads, kv_heads, capacity, slots, first_sequence, scale, cap, window,
    DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ROTATE: tl.constexpr, SLOPE: tl.constexpr,
    SINK: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, RUNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A program takes BM tokens of a sequence, and one head; keys come in blocks of BN.

    Both begin at multiples of BM and BN in the sequence: what a token sums, and in which order,
    does not depend on the other sequences, nor on the pieces in which its own sequence comes.

    Args:
        qkv, cos, sin, rows, starts, positions: of `write_tokens`.
        keys, values: (R, H_kv, capacity, D), a token at its position modulo capacity; with RUNS,
            not of rows but of the sequences from first_sequence on, runs before a token's own.
        own_keys, own_values: with RUNS, what a token sees of its own run, which BM tokens are:
            `quantized_prefill.write_runs`. With DESCRIBED these and the others are descriptors of
            blocks (BN, WIDTH).
        y: (N, H, D), D = DIM padded to WIDTH.
    """
    type: tl.constexpr = qkv.dtype.element_ty
    head, sequence = tl.program_id(0), tl.program_id(1) + first_sequence
    block = tl.num_programs(2) - 1 - tl.program_id(2)  # Those with most keys begin first.
    begin = tl.load(starts + sequence)
    tokens = (tl.load(starts + sequence + 1) - begin).to(tl.int32)
    past = tl.load(positions + begin).to(tl.int32)
    first, end = past // BM * BM + block * BM, past + tokens
    if first < end:
        position, column = first + tl.arange(0, BM), tl.arange(0, WIDTH)
        token = begin + (position - past)
        inside = ((position >= past) & (position < end))[:, None] & (column < DIM)[None, :]
        source = qkv + (token * (heads + 2 * kv_heads) * DIM)[:, None] + head * DIM
        cos_sin = (source, source)
        if ROTATE:
            cos_sin = (cos + (token * DIM)[:, None], sin + (token * DIM)[:, None])
        queries = operand(load_heads(source, column, inside, cos_sin, DIM, FIRST, ROTATE, type))
        kv_head = head // GROUP
        row = tl.program_id(1).to(tl.int64) if RUNS else tl.load(rows + sequence)
        sources = (keys, values, (row * kv_heads + kv_head) * capacity, capacity)
        how = (scale, cap, window, tl.load(slopes + head) if SLOPE else 0.0)
        same = tl.zeros((BM,), tl.int32) + head
        m_i, l_i = no_softmax(sinks, same, same == head, BM, SINK)
        state = (m_i, l_i, tl.zeros((BM, WIDTH), tl.float32))
        whole, late, last = past * 0, first, tl.minimum(first + BM, end)
        if WINDOW:
            edge = tl.maximum(tl.maximum(first, past) + 1 - window, 0) // BN * BN
            whole = tl.minimum((tl.maximum(first + BM - window, 0) + BN - 1) // BN * BN, first)
            state = _attend(
                queries, sources, (edge, whole), position, how, state,
                DIM, WIDTH, BN, SLOPE, CAP, WINDOW, DESCRIBED, False, type,
            )  # fmt: skip
            late = tl.maximum(first, edge)
        if DESCRIBED:
            state = _attend_to_all(
                queries, sources, (whole, first), position, how, state,
                BN, SLOPE, CAP, WINDOW, type,
            )  # fmt: skip
        else:  # There are too few registers for the products of two blocks.
            state = _attend(
                queries, sources, (whole, first), position, how, state,
                DIM, WIDTH, BN, SLOPE, CAP, WINDOW, DESCRIBED, True, type,
            )  # fmt: skip
        if RUNS:
            area = begin + sequence * RUN - past // RUN * RUN
            sources = (own_keys, own_values, kv_head.to(tl.int64) * slots + area, 1 << 30)
        state = _attend(
            queries, sources, (late, last), position, how, state,
            DIM, WIDTH, BN, SLOPE, CAP, WINDOW, DESCRIBED, False, type,
        )  # fmt: skip
        m_i, l_i, acc = state
        out = y + ((token * heads + head) * DIM)[:, None] + column[None, :]
        tl.store(out, narrow(acc / l_i[:, None], type), mask=inside)
