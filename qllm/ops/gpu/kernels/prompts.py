"""Attention of whole prompts, each to itself, all in one launch."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.attention import _turned
from qllm.ops.gpu.kernels.numbers import bound, narrow, operand


@triton.jit
def place_tokens(
    qkv, cos, sin, row_of, positions, q, keys, values, heads, kv_heads, capacity,
    DIM: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """Put the heads of a token where attention looks for them: a program's work.

    Queries and keys are turned, in halves of FIRST and fewer columns, each in room for HALF; there
    is room for HEADS heads.

    Args:
        qkv: (N, (H + 2 H_kv) D).
        cos, sin: (N, D).
        row_of, positions: int64 (N,), of the cache.
        q: (N, H, D).
        keys, values: (B, H_kv, capacity, D).
    """
    type: tl.constexpr = qkv.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF)
    in_first, in_second = (column < FIRST)[None, :], (column < DIM - FIRST)[None, :]
    is_query, all_heads = (head < heads)[:, None], heads + 2 * kv_heads
    turned = (head < heads + kv_heads)[:, None]
    source = qkv + token * all_heads * DIM + (head * DIM)[:, None] + column[None, :]
    real = (head < all_heads)[:, None]
    a = tl.load(source, mask=real & in_first, other=0.0)
    b = tl.load(source + FIRST, mask=real & in_second, other=0.0)
    if TURN:
        at = token * DIM + column
        c1 = tl.load(cos + at, mask=column < FIRST, other=0.0).to(tl.float32)
        s1 = tl.load(sin + at, mask=column < FIRST, other=0.0).to(tl.float32)
        c2 = tl.load(cos + at + FIRST, mask=column < DIM - FIRST, other=0.0).to(tl.float32)
        s2 = tl.load(sin + at + FIRST, mask=column < DIM - FIRST, other=0.0).to(tl.float32)
        first, second = _turned(a, b, c1, s1, type), _turned(b, a, c2, -s2, type)
        a, b = tl.where(turned, first, a), tl.where(turned, second, b)
    target = q + token * heads * DIM + (head * DIM)[:, None] + column[None, :]
    tl.store(target, a, mask=is_query & in_first)
    tl.store(target + FIRST, b, mask=is_query & in_second)
    row, position = tl.load(row_of + token), tl.load(positions + token)
    kv_head = (head - heads) % kv_heads
    place = (((row * kv_heads + kv_head) * capacity + position) * DIM)[:, None] + column[None, :]
    is_key, is_value = turned & (head >= heads)[:, None], real & (head >= heads + kv_heads)[:, None]
    tl.store(keys + place, a, mask=is_key & in_first)
    tl.store(keys + place + FIRST, b, mask=is_key & in_second)
    tl.store(values + place, a, mask=is_value & in_first)
    tl.store(values + place + FIRST, b, mask=is_value & in_second)


@triton.jit
def prompt_attention(
    q, keys, values, slopes, starts, y, heads, kv_heads, capacity, scale,
    DIM: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """A program takes BM tokens of a prompt, and one head; keys come in blocks of BN.

    How a prompt is cut does not depend on the others.

    Args:
        q, y: (N, H, D), D = DIM in room for WIDTH.
        keys, values: (B, H_kv, capacity, D).
        starts: int32 (B + 1,), of prompts among the N tokens.
    """
    type: tl.constexpr = q.dtype.element_ty
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts + row)
    length = tl.load(starts + row + 1) - begin
    first = block * BM
    if first < length:
        m, n, column = first + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, WIDTH)
        within = (column < DIM)[None, :]
        place = ((begin + m).to(tl.int64) * heads + head)[:, None] * DIM + column[None, :]
        inside = (m < length)[:, None] & within
        queries = operand(tl.load(q + place, mask=inside, other=0.0))
        base = (row * kv_heads + head // GROUP).to(tl.int64) * capacity * DIM
        slope = tl.load(slopes + head) if SLOPE else 0.0
        most = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        sums = tl.zeros((BM, WIDTH), tl.float32)
        for start in range(0, bound(tl.minimum(length, first + BM)), BN):
            token = start + n
            there = base + token[:, None] * DIM + column[None, :]
            known = (token < length)[:, None] & within
            k = operand(tl.load(keys + there, mask=known, other=0.0))
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
            distance = token[None, :] - m[:, None]
            if SLOPE:
                scores += slope * distance.to(tl.float32)
            scores = tl.where(distance <= 0, scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            fade = tl.exp(most - higher)
            weights = tl.exp(scores - higher[:, None])
            most, total = higher, total * fade + tl.sum(weights, 1)
            v = operand(tl.load(values + there, mask=known, other=0.0))
            weights = operand(narrow(weights, type))
            sums = tl.dot(weights, v, sums * fade[:, None], input_precision="ieee")
        tl.store(y + place, narrow(sums / total[:, None], type), mask=inside)
