"""Attention of runs of tokens to those before them in the cache and to themselves."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.attention import rotated, scaled
from qllm.ops.gpu.kernels.numbers import bound, narrow, operand


@triton.jit(do_not_specialize=["capacity"])
def write_tokens(
    qkv, cos, sin, rows, starts, positions, q, keys, values, heads, kv_heads, capacity,
    DIM: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Put the heads of a token of a sequence where attention looks for them: a program's work.

    Queries and keys are rotated, in halves of FIRST and fewer columns, each padded to HALF; the
    heads are padded to HEADS.

    Args:
        qkv: (N, (H + 2 H_kv) D).
        cos, sin: (N, D).
        rows: int64 (B,), of the cache.
        starts: int64 (B + 1,), of sequences among the N tokens.
        positions: int64 (N,).
        q: (N, H, D).
        keys, values: (R, H_kv, capacity, D), a token at its position modulo capacity.
    """
    type: tl.constexpr = qkv.dtype.element_ty
    sequence = tl.program_id(1)
    token = tl.load(starts + sequence) + tl.program_id(0)
    if token >= tl.load(starts + sequence + 1):
        return
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF)
    in_first, in_second = (column < FIRST)[None, :], (column < DIM - FIRST)[None, :]
    is_query, all_heads = (head < heads)[:, None], heads + 2 * kv_heads
    rotates = (head < heads + kv_heads)[:, None]
    source = qkv + token * all_heads * DIM + (head * DIM)[:, None] + column[None, :]
    real = (head < all_heads)[:, None]
    a = tl.load(source, mask=real & in_first, other=0.0)
    b = tl.load(source + FIRST, mask=real & in_second, other=0.0)
    if ROTATE:
        at = token * DIM + column
        c1 = tl.load(cos + at, mask=column < FIRST, other=0.0).to(tl.float32)
        s1 = tl.load(sin + at, mask=column < FIRST, other=0.0).to(tl.float32)
        c2 = tl.load(cos + at + FIRST, mask=column < DIM - FIRST, other=0.0).to(tl.float32)
        s2 = tl.load(sin + at + FIRST, mask=column < DIM - FIRST, other=0.0).to(tl.float32)
        first, second = rotated(a, b, c1, s1, type), rotated(b, a, c2, -s2, type)
        a, b = tl.where(rotates, first, a), tl.where(rotates, second, b)
    target = q + token * heads * DIM + (head * DIM)[:, None] + column[None, :]
    tl.store(target, a, mask=is_query & in_first)
    tl.store(target + FIRST, b, mask=is_query & in_second)
    row, held = tl.load(rows + sequence), tl.load(positions + token) % capacity
    kv_head = (head - heads) % kv_heads
    place = (((row * kv_heads + kv_head) * capacity + held) * DIM)[:, None] + column[None, :]
    is_key, is_value = (
        rotates & (head >= heads)[:, None],
        real & (head >= heads + kv_heads)[:, None],
    )
    tl.store(keys + place, a, mask=is_key & in_first)
    tl.store(keys + place + FIRST, b, mask=is_key & in_second)
    tl.store(values + place, a, mask=is_value & in_first)
    tl.store(values + place + FIRST, b, mask=is_value & in_second)


@triton.jit
def weigh(
    queries, k, distance, how, state, SLOPE: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """What queries (M, C) make of a block of keys (BN, C).

    Args:
        distance: (M, BN), of keys from queries, negative where they come before.
        how: scale, cap and window, and the slopes of the queries.
        state: the largest score of each query so far, and the sum of weights.

    Returns:
        The weights (M, BN) of the block's values, by what those before them are scaled, and the
        state after the block.
    """
    scale, cap, window, slope = how
    m_i, l_i = state
    scores = tl.dot(queries, tl.trans(operand(k)), input_precision="ieee")
    scores = scaled(scores, scale, cap, CAP)
    if SLOPE:
        scores += slope * distance.to(tl.float32)
    seen = distance <= 0
    if WINDOW:
        seen = seen & (distance > -window)
    scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    if WINDOW:  # there may be none so far, and infinity less infinity is no number
        m_new = tl.where(m_new == float("-inf"), -1e30, m_new)
    alpha = tl.exp(m_i - m_new)
    weights = tl.exp(scores - m_new[:, None])
    l_i = l_i * alpha + tl.sum(weights, 1)
    return operand(narrow(weights, type)), alpha, (m_new, l_i)


@triton.jit(do_not_specialize=["capacity"])
def prefill_attention(
    q, keys, values, slopes, rows, starts, positions, y, heads, kv_heads, capacity, scale,
    cap, window,
    DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SLOPE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A program takes BM tokens of a sequence, and one head; keys come in blocks of BN.

    Blocks of keys begin at the sequence's first token: what a token sums, and in which order, does
    not depend on the other sequences, nor on the runs in which its own sequence comes.

    Args:
        q, y: (N, H, D), D = DIM padded to WIDTH.
        keys, values: (R, H_kv, capacity, D).
        rows, starts, positions: as above.
    """
    type: tl.constexpr = q.dtype.element_ty
    block, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts + sequence)
    tokens = (tl.load(starts + sequence + 1) - begin).to(tl.int32)
    first = block * BM
    if first < tokens:
        past = tl.load(positions + begin).to(tl.int32)
        m, n, column = first + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, WIDTH)
        within = (column < DIM)[None, :]
        place = ((begin + m) * heads + head)[:, None] * DIM + column[None, :]
        inside = (m < tokens)[:, None] & within
        queries = operand(tl.load(q + place, mask=inside, other=0.0))
        base = (tl.load(rows + sequence) * kv_heads + head // GROUP) * capacity * DIM
        length = past + tl.minimum(tokens, first + BM)
        slope = tl.load(slopes + head) if SLOPE else 0.0
        m_i = tl.full((BM,), float("-inf"), tl.float32)
        l_i = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, WIDTH), tl.float32)
        begin_key = past * 0
        if WINDOW:
            begin_key = tl.maximum(past + first + 1 - window, 0) // BN * BN
        for start in range(bound(begin_key), bound(length), BN):
            token = start + n
            # A block is in whole runs of tokens, which lie together.
            there = base + (start % capacity + n)[:, None] * DIM + column[None, :]
            known = (token < length)[:, None] & within
            k = tl.load(keys + there, mask=known, other=0.0)
            distance = token[None, :] - (past + m)[:, None]
            how = (scale, cap, window, slope)
            weights, alpha, state = weigh(
                queries, k, distance, how, (m_i, l_i), SLOPE, CAP, WINDOW, type
            )
            m_i, l_i = state
            v = operand(tl.load(values + there, mask=known, other=0.0))
            acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
        tl.store(y + place, narrow(acc / l_i[:, None], type), mask=inside)
