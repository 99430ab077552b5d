"""Attention of one new token per row to the cache."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.codes import RUN, add_values, in_words, multiply_keys, quantize_run
from qllm.ops.gpu.kernels.numbers import (
    bound,
    let_next_begin,
    narrow,
    operand,
    wait_for_previous,
)

LOWEST = tl.constexpr(-1e38)  # what no score is below, and finite: less itself it is a number


@triton.jit
def rotated_heads(source, column, mask, cos_sin, DIM: tl.constexpr, FIRST: tl.constexpr):
    """Columns (C,) of rows of heads, rotated: (R, C) float32.

    Args:
        source: pointers to the first column of each row, (R, 1).
        cos_sin: of each row or of all, pointers to the first of cosines and of sines.
    """
    cos, sin = cos_sin
    in_first = (column < FIRST)[None, :]
    partner = tl.where(in_first, column[None, :] + FIRST, column[None, :] - FIRST)
    x = tl.load(source + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + column[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return x * c + tl.where(in_first, -other, other) * s


@triton.jit
def load_heads(
    source, column, mask, cos_sin, DIM: tl.constexpr, FIRST: tl.constexpr, ROTATE: tl.constexpr,
    type: tl.constexpr,
):  # fmt: skip
    """The same in a type, rotated with ROTATE."""
    if ROTATE:
        return narrow(rotated_heads(source, column, mask, cos_sin, DIM, FIRST), type)
    return tl.load(source + column[None, :], mask=mask, other=0.0)


@triton.jit
def heads_of_fours(
    source, is_row, cos_sin, DIM: tl.constexpr, FIRST: tl.constexpr, QUARTER: tl.constexpr,
    ROTATE: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """The same of each fourth column, from each of the first four on: four times (R, QUARTER)."""
    a = tl.arange(0, QUARTER) * 4
    b, c, d = a + 1, a + 2, a + 3
    return (
        load_heads(source, a, is_row & (a < DIM)[None, :], cos_sin, DIM, FIRST, ROTATE, type),
        load_heads(source, b, is_row & (b < DIM)[None, :], cos_sin, DIM, FIRST, ROTATE, type),
        load_heads(source, c, is_row & (c < DIM)[None, :], cos_sin, DIM, FIRST, ROTATE, type),
        load_heads(source, d, is_row & (d < DIM)[None, :], cos_sin, DIM, FIRST, ROTATE, type),
    )


@triton.jit
def scaled(products, scale, cap, CAP: tl.constexpr):
    """Scores: products times a scale, softly kept below a cap."""
    scores = products * scale
    if CAP:  # cap tanh u = cap (1 - 2 / (1 + e^2u))
        scores = cap * (1.0 - 2.0 / (1.0 + tl.exp(scores * (2.0 / cap))))
    return scores


@triton.jit
def in_base_2(products, scale, cap, slope, distance, CAP: tl.constexpr, SLOPE: tl.constexpr):
    """Scores, and what makes of them exponents of 2."""
    log2_e: tl.constexpr = 1.4426950408889634
    if CAP or SLOPE:
        products = scaled(products, scale, cap, CAP)
        if SLOPE:
            products += slope * distance.to(tl.float32)
        factor = log2_e
    else:
        factor = scale * log2_e
    return products, factor


@triton.jit
def no_softmax(sinks, head, known, COUNT: tl.constexpr, SINK: tl.constexpr):
    """The state in front of the first score, or behind a sink, which weighs no value.

    Args:
        sinks: with SINK, (H,), a score of each head that joins its softmax.
        head: (COUNT,), some of which are `known`.
    """
    m_i, l_i = tl.full((COUNT,), LOWEST, tl.float32), tl.zeros((COUNT,), tl.float32)
    if SINK:
        log2_e: tl.constexpr = 1.4426950408889634
        m_i = tl.where(known, tl.load(sinks + head, mask=known, other=0.0) * log2_e, m_i)
        l_i = tl.where(known, 1.0, l_i)
    return m_i, l_i


@triton.jit
def soften(scores, factor, state):
    """Weights of scores, what those before them are scaled by, and the state behind them.

    Args:
        state: the largest exponent of 2 so far, and the sum of weights.
    """
    m_i, l_i = state
    m_new = tl.maximum(m_i, tl.max(scores, 1) * factor)
    alpha = tl.exp2(m_i - m_new)
    weights = tl.exp2(scores * factor - m_new[:, None])
    return weights, alpha, (m_new, l_i * alpha + tl.sum(weights, 1))


@triton.jit(do_not_specialize=["splits", "capacity"])
def decode_attention(  # noqa: PLR0912 - one launch
    qkv, cos, sin, slopes, sinks, keys, values, key_codes, value_codes, key_scales, value_scales,
    key_zeros, value_zeros, rows, positions, y, partials, counters, heads, kv_heads, capacity,
    splits, scale, cap, window,
    DIM: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    ROTATE: tl.constexpr, SLOPE: tl.constexpr, SINK: tl.constexpr, CAP: tl.constexpr,
    WINDOW: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, JOINED: tl.constexpr,
    AT_ONCE: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """A program takes SPAN tokens of a sequence's cache, one key head and all heads that read it.

    The program of the new token puts its key and value into the cache, and takes them from its
    registers. The last program of a sequence and key head to finish joins what all have found, in
    the order of the tokens. How the cache is cut does not depend on the other sequences.

    Args:
        qkv: (B, (H + 2 H_kv) D), D = DIM padded to COLUMNS.
        cos, sin: (B, D).
        keys, values: (R, H_kv, capacity, D), a token at its position modulo capacity; with BITS of
            8 and 4, of the newest run of RUN tokens alone, those before it being integers, of D
            padded to WIDTH: `qllm.ops.quantized_kv`, whose bytes and scales are taken in int32.
        rows: int64 (B,), of the cache.
        positions: int64 (B,).
        window: tokens that a query sees, its own included, with WINDOW; else all before it.
        y: (B, H D).
        splits: programs of a sequence and key head, several with SPLIT.
        partials: float32, (B H_kv, splits, GROUP, COLUMNS + 2); JOINED, GROUP or the next power of
            two, are joined of AT_ONCE programs.
        LATE: it begins before the kernel in front has ended.
    """
    let_next_begin(LATE)
    wait_for_previous(LATE)
    type: tl.constexpr = qkv.dtype.element_ty
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + sequence).to(tl.int32)
    column, member = tl.arange(0, COLUMNS), tl.arange(0, PADDED_GROUP)
    within, is_head = (column < DIM)[None, :], (member < GROUP)[:, None]
    first_token = position * 0
    if WINDOW:
        first_token = tl.maximum(position + 1 - window, 0)
    split = first_token // SPAN + part
    if split * SPAN <= position:
        item = tl.load(rows + sequence) * kv_heads + kv_head
        own = qkv + sequence.to(tl.int64) * (heads + 2 * kv_heads) * DIM
        cos_sin = (cos + sequence * DIM, sin + sequence * DIM) if ROTATE else (own, own)
        heads_at = own + ((kv_head * GROUP + member) * DIM)[:, None]
        slope = tl.zeros((PADDED_GROUP, 1), tl.float32)
        if SLOPE:
            at = slopes + kv_head * GROUP + member
            slope = tl.load(at, mask=member < GROUP, other=0.0)[:, None]
        # Of the programs of a head, the first counts its sink.
        known = (member < GROUP) & (part == 0)
        m_i, l_i = no_softmax(sinks, kv_head * GROUP + member, known, PADDED_GROUP, SINK)
        acc = tl.zeros((PADDED_GROUP, COLUMNS), tl.float32)
        begin, end = split * SPAN, tl.minimum(position, (split + 1) * SPAN)
        if WINDOW:  # with a block in which there is a token, or with none
            begin = tl.maximum(begin, first_token // BLOCK * BLOCK)
            begin = tl.where(first_token < end, begin, end)
        offs, recent = item * capacity * DIM, position * 0  # recent: the first that is no integer
        if BITS != 16:
            offs, recent = item * RUN * DIM, position // RUN * RUN
            quarter: tl.constexpr = max(16, COLUMNS // 4)
            q = heads_of_fours(heads_at, is_head, cos_sin, DIM, FIRST, quarter, ROTATE, type)
            of_keys = (key_codes, key_scales, key_zeros)
            of_values = (value_codes, value_scales, value_zeros)
            key_words, value_words = in_words(of_keys), in_words(of_values)
            begin = begin // RUN * RUN
            for start in range(bound(begin), bound(tl.minimum(end, recent)), RUN):
                run = item * (capacity // RUN) + start % capacity // RUN
                products = multiply_keys(q, key_words, run, quarter, WIDTH, BITS, type)
                distance = (start - position + tl.arange(0, RUN))[None, :]
                scores, factor = in_base_2(products, scale, cap, slope, distance, CAP, SLOPE)
                if WINDOW:
                    scores = tl.where(distance > -window, scores, float("-inf"))
                weights, alpha, state = soften(scores, factor, (m_i, l_i))
                m_i, l_i = state
                acc = add_values(
                    narrow(weights, type), value_words, run, column, acc * alpha[:, None], WIDTH,
                    BITS, type,
                )  # fmt: skip
            begin = tl.maximum(begin, recent)
        q = load_heads(heads_at, column, is_head & within, cos_sin, DIM, FIRST, ROTATE, type)
        for start in range(bound(begin), bound(end), BLOCK):
            token = start + tl.arange(0, BLOCK)
            here = token < end
            if WINDOW:
                here = here & (token >= first_token)
            held = token - start + start % capacity  # a block is part of one run
            if BITS != 16:
                held = token % RUN
            there = offs + (held * DIM)[:, None] + column[None, :]
            k = tl.load(keys + there, mask=here[:, None] & within, other=0.0)
            products = tl.dot(operand(q), tl.trans(operand(k)), input_precision="ieee")
            distance = (token - position)[None, :]
            scores, factor = in_base_2(products, scale, cap, slope, distance, CAP, SLOPE)
            scores = tl.where(here[None, :], scores, float("-inf"))
            weights, alpha, state = soften(scores, factor, (m_i, l_i))
            m_i, l_i = state
            v = tl.load(values + there, mask=here[:, None] & within, other=0.0)
            weights = operand(narrow(weights, type))
            acc = tl.dot(weights, operand(v), acc * alpha[:, None], input_precision="ieee")

        if position < (split + 1) * SPAN:
            one = tl.zeros((1, 1), tl.int32)
            key = own + (heads + kv_head + one) * DIM
            k = load_heads(key, column, within, cos_sin, DIM, FIRST, ROTATE, type)
            v = tl.load(key + kv_heads * DIM + column[None, :], mask=within, other=0.0)
            target = offs + (position % capacity - recent % capacity) * DIM + column[None, :]
            tl.store(keys + target, k, mask=within)
            tl.store(values + target, v, mask=within)
            product = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[:, None]
            score, factor = in_base_2(product, scale, cap, slope, one, CAP, SLOPE)
            weight, alpha, state = soften(score, factor, (m_i, l_i))
            m_i, l_i = state
            acc = acc * alpha[:, None] + weight * v.to(tl.float32)
            if BITS != 16:  # noqa: SIM102 - which is known when it is compiled
                if position - recent == RUN - 1:  # a run is whole
                    run = item * (capacity // RUN) + position % capacity // RUN
                    tl.debug_barrier()  # all threads have stored what others now read
                    quantize_run(
                        keys + offs, values + offs, of_keys, of_values, run, DIM, COLUMNS, WIDTH,
                        BITS,
                    )  # fmt: skip

        out = y + sequence.to(tl.int64) * heads * DIM + kv_head * GROUP * DIM + column[None, :]
        if SPLIT:
            count = position // SPAN + 1 - first_token // SPAN  # of programs with something to say
            size: tl.constexpr = COLUMNS + 2
            cell = partials + (sequence * kv_heads + kv_head).to(tl.int64) * splits * (GROUP * size)
            mine = cell + (part * GROUP + member)[:, None] * size
            tl.store(mine + column[None, :], acc, mask=is_head)
            tl.store(mine + COLUMNS, m_i[:, None], mask=is_head)
            tl.store(mine + COLUMNS + 1, l_i[:, None], mask=is_head)
            tl.debug_barrier()  # all threads have stored before one of them says so
            counter = counters + sequence * kv_heads + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
                tl.store(counter, 0)  # for the next launch
                _join(cell, out, count, column, GROUP, COLUMNS, JOINED, AT_ONCE, DIM, type)
        else:
            mean = narrow(acc / l_i[:, None], type)
            tl.store(out + (member * DIM)[:, None], mean, mask=is_head & within)


@triton.jit
def _join(
    cell, out, count, column, GROUP: tl.constexpr, COLUMNS: tl.constexpr, JOINED: tl.constexpr,
    AT_ONCE: tl.constexpr, DIM: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """Join what programs have found, in order and so many at once."""
    size: tl.constexpr = COLUMNS + 2
    member, one = tl.arange(0, JOINED), tl.arange(0, AT_ONCE)
    m_i = tl.full((JOINED,), LOWEST, tl.float32)
    l_i = tl.zeros((JOINED,), tl.float32)
    acc = tl.zeros((JOINED, COLUMNS), tl.float32)
    for first in range(0, bound(count), AT_ONCE):
        other = first + one
        there = (other < count)[:, None] & (member < GROUP)[None, :]
        theirs = cell + (other[:, None] * GROUP + member[None, :]) * size
        top = tl.load(theirs + COLUMNS, mask=there, other=LOWEST, cache_modifier=".cg")
        total = tl.load(theirs + COLUMNS + 1, mask=there, other=0.0, cache_modifier=".cg")
        found = tl.load(
            theirs[:, :, None] + column[None, None, :], mask=there[:, :, None], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(top, 0))
        alpha, weight = tl.exp2(m_i - m_new), tl.exp2(top - m_new[None, :])
        m_i, l_i = m_new, l_i * alpha + tl.sum(weight * total, 0)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * found, 0)
    mask = (member < GROUP)[:, None] & (column < DIM)[None, :]
    tl.store(out + (member * DIM)[:, None], narrow(acc / l_i[:, None], type), mask=mask)
