"""Attention of one new token per row to the cache."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.codes import RUN, load_held, quantize_keys, quantize_values
from qllm.ops.gpu.kernels.numbers import bound, narrow, operand


@triton.jit
def _load_half(base, rows, inside, column, within):
    """Columns of some heads: (R, HALF), zeros outside."""
    place = base + rows[:, None] + column[None, :]
    return tl.load(place, mask=inside[:, None] & within[None, :], other=0.0)


@triton.jit
def rotated(a, b, cos, sin, type: tl.constexpr):
    """The first half of heads (a, b), rotated; with -sin of (b, a), the second."""
    return narrow(a.to(tl.float32) * cos[None, :] - b.to(tl.float32) * sin[None, :], type)


@triton.jit
def scaled(products, scale, cap, CAP: tl.constexpr):
    """Scores: products times a scale, softly kept below a cap."""
    scores = products * scale
    if CAP:  # cap tanh u = cap (1 - 2 / (1 + e^2u))
        scores = cap * (1.0 - 2.0 / (1.0 + tl.exp(scores * (2.0 / cap))))
    return scores


@triton.jit(do_not_specialize=["splits", "capacity"])
def decode_attention(  # noqa: PLR0912 - one launch
    qkv, cos, sin, slopes, keys, values, key_codes, value_codes, key_scales, value_scales,
    key_zeros, value_zeros, rows, positions, y, partials, counters, heads, kv_heads, capacity,
    splits, scale, cap, window,
    DIM: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    ROTATE: tl.constexpr, SLOPE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program takes SPAN tokens of a sequence's cache, one key head and all heads that read it.

    The program of the new token puts its key and value into the cache, and takes them from its
    registers. The last program of a sequence and key head to finish joins what all have found, in
    the order of the tokens. How the cache is cut does not depend on the other sequences.

    A head's D = DIM columns are taken in two halves, the first of FIRST columns, each padded to
    HALF: so they are rotated.

    Args:
        qkv: (B, (H + 2 H_kv) D).
        cos, sin: (B, D).
        keys, values: (R, H_kv, capacity, D), a token at its position modulo capacity; with BITS of
            8 and 4, of the newest run of RUN tokens alone, those before it being integers, of D
            padded to WIDTH: `qllm.ops.quantized_kv`.
        rows: int64 (B,), of the cache.
        positions: int64 (B,).
        window: tokens that a query sees, its own included, with WINDOW; else all before it.
        y: (B, H D).
        splits: programs of a sequence and key head, several with SPLIT.
        partials: float32, (B H_kv, splits, PADDED_GROUP, 2 HALF + 2).
    """
    type: tl.constexpr = qkv.dtype.element_ty
    sequence, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + sequence).to(tl.int32)
    column = tl.arange(0, HALF)
    in_first, in_second = column < FIRST, column < DIM - FIRST
    member = tl.arange(0, PADDED_GROUP)
    is_head = member < GROUP
    head = kv_head * GROUP + member
    first_token = position * 0
    if WINDOW:
        first_token = tl.maximum(position + 1 - window, 0)
    split = first_token // SPAN + part
    if split * SPAN <= position:
        own = qkv + sequence.to(tl.int64) * (heads + 2 * kv_heads) * DIM
        one = tl.arange(0, 1)
        q1 = _load_half(own, head * DIM, is_head, column, in_first)
        q2 = _load_half(own, head * DIM + FIRST, is_head, column, in_second)
        key = (heads + kv_head + one) * DIM
        k1 = _load_half(own, key, one == 0, column, in_first)
        k2 = _load_half(own, key + FIRST, one == 0, column, in_second)
        if ROTATE:
            at = sequence * DIM + column
            c1 = tl.load(cos + at, mask=in_first, other=0.0).to(tl.float32)
            s1 = tl.load(sin + at, mask=in_first, other=0.0).to(tl.float32)
            c2 = tl.load(cos + at + FIRST, mask=in_second, other=0.0).to(tl.float32)
            s2 = tl.load(sin + at + FIRST, mask=in_second, other=0.0).to(tl.float32)
            r1, r2 = rotated(q1, q2, c1, s1, type), rotated(q2, q1, c2, -s2, type)
            q1, q2 = r1, r2
            r1, r2 = rotated(k1, k2, c1, s1, type), rotated(k2, k1, c2, -s2, type)
            k1, k2 = r1, r2
        slope = tl.zeros((PADDED_GROUP,), tl.float32)
        if SLOPE:
            slope = tl.load(slopes + head, mask=is_head, other=0.0)

        m_i = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
        l_i = tl.zeros((PADDED_GROUP,), tl.float32)
        acc1 = tl.zeros((PADDED_GROUP, HALF), tl.float32)
        acc2 = tl.zeros((PADDED_GROUP, HALF), tl.float32)
        item = tl.load(rows + sequence) * kv_heads + kv_head
        place = item * capacity * DIM
        recent = position * 0  # the first token that is no integer
        if BITS != 16:
            place = item * RUN * DIM
            recent = position // RUN * RUN
        second = column + FIRST
        end = tl.minimum(position, (split + 1) * SPAN)
        begin = split * SPAN
        if WINDOW:  # with a block in which there is a token, or with none
            begin = tl.maximum(begin, first_token // BLOCK * BLOCK)
            begin = tl.where(first_token < end, begin, end)
        for start in range(bound(begin), bound(end), BLOCK):
            token = start + tl.arange(0, BLOCK)
            here = token < end
            if WINDOW:
                here = here & (token >= first_token)
            in_run, run = token - start + start % capacity, item  # a block is part of one run
            if BITS != 16:
                in_run, run = token % RUN, item * (capacity // RUN) + start % capacity // RUN
            held, codes = keys + place, (key_codes, key_scales, key_zeros)
            how = (run, in_run, here, start >= recent)
            old1 = load_held(held, codes, how, column, in_first, True, DIM, WIDTH, BITS, type)
            old2 = load_held(held, codes, how, second, in_second, True, DIM, WIDTH, BITS, type)
            scores = tl.dot(operand(q1), tl.trans(operand(old1)), input_precision="ieee")
            scores = tl.dot(operand(q2), tl.trans(operand(old2)), scores, input_precision="ieee")
            scores = scaled(scores, scale, cap, CAP)
            scores += slope[:, None] * (token - position).to(tl.float32)[None, :]
            scores = tl.where(here[None, :], scores, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            alpha = tl.exp(m_i - m_new)
            weights = tl.exp(scores - m_new[:, None])
            m_i, l_i = m_new, l_i * alpha + tl.sum(weights, 1)
            held, codes = values + place, (value_codes, value_scales, value_zeros)
            old1 = load_held(held, codes, how, column, in_first, False, DIM, WIDTH, BITS, type)
            old2 = load_held(held, codes, how, second, in_second, False, DIM, WIDTH, BITS, type)
            weights = operand(narrow(weights, type))
            acc1 = tl.dot(weights, operand(old1), acc1 * alpha[:, None], input_precision="ieee")
            acc2 = tl.dot(weights, operand(old2), acc2 * alpha[:, None], input_precision="ieee")

        if position < (split + 1) * SPAN:
            value = (heads + kv_heads + kv_head + one) * DIM
            v1 = _load_half(own, value, one == 0, column, in_first)
            v2 = _load_half(own, value + FIRST, one == 0, column, in_second)
            target = place + (position % capacity - recent % capacity) * DIM + column[None, :]
            tl.store(keys + target, k1, mask=in_first[None, :])
            tl.store(keys + target + FIRST, k2, mask=in_second[None, :])
            tl.store(values + target, v1, mask=in_first[None, :])
            tl.store(values + target + FIRST, v2, mask=in_second[None, :])
            score = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1)
            score += tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)
            score = scaled(score, scale, cap, CAP)
            m_new = tl.maximum(m_i, score)
            alpha, weight = tl.exp(m_i - m_new), tl.exp(score - m_new)
            m_i, l_i = m_new, l_i * alpha + weight
            acc1 = acc1 * alpha[:, None] + weight[:, None] * v1.to(tl.float32)
            acc2 = acc2 * alpha[:, None] + weight[:, None] * v2.to(tl.float32)
            if BITS != 16:
                run = item * (capacity // RUN) + position % capacity // RUN
                of_keys = (key_codes, key_scales, key_zeros)
                of_values = (value_codes, value_scales, value_zeros)
                if position - recent == RUN - 1:  # a run is whole
                    tl.debug_barrier()  # all threads have stored what others now read
                    quantize_keys(keys + place, of_keys, run, column, in_first, DIM, WIDTH, BITS)
                    quantize_keys(keys + place, of_keys, run, second, in_second, DIM, WIDTH, BITS)
                    quantize_values(values + place, of_values, run, DIM, 2 * HALF, WIDTH, BITS)

        last = True
        if SPLIT:
            count = position // SPAN + 1 - first_token // SPAN  # of programs with something to say
            width: tl.constexpr = 2 * HALF + 2
            cell = (sequence * kv_heads + kv_head).to(tl.int64) * splits * PADDED_GROUP + member
            mine = partials + (cell + part * PADDED_GROUP) * width
            tl.store(mine[:, None] + column[None, :], acc1)
            tl.store(mine[:, None] + HALF + column[None, :], acc2)
            tl.store(mine + 2 * HALF, m_i)
            tl.store(mine + 2 * HALF + 1, l_i)
            tl.debug_barrier()  # all threads have stored before one of them says so
            counter = counters + sequence * kv_heads + kv_head
            last = tl.atomic_add(counter, 1, sem="acq_rel") == count - 1
            if last:
                tl.store(counter, 0)  # for the next launch
                m_i = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
                l_i = tl.zeros((PADDED_GROUP,), tl.float32)
                acc1 = tl.zeros((PADDED_GROUP, HALF), tl.float32)
                acc2 = tl.zeros((PADDED_GROUP, HALF), tl.float32)
                for other in range(bound(count)):
                    theirs = partials + (cell + other * PADDED_GROUP) * width
                    top = tl.load(theirs + 2 * HALF, cache_modifier=".cg")
                    m_new = tl.maximum(m_i, top)
                    alpha, weight = tl.exp(m_i - m_new), tl.exp(top - m_new)
                    found = tl.load(theirs + 2 * HALF + 1, cache_modifier=".cg")
                    m_i, l_i = m_new, l_i * alpha + weight * found
                    found1 = tl.load(theirs[:, None] + column[None, :], cache_modifier=".cg")
                    found2 = tl.load(theirs[:, None] + HALF + column[None, :], cache_modifier=".cg")
                    acc1 = acc1 * alpha[:, None] + weight[:, None] * found1
                    acc2 = acc2 * alpha[:, None] + weight[:, None] * found2
        if last:
            out = y + sequence.to(tl.int64) * heads * DIM + (head * DIM)[:, None] + column[None, :]
            mean1 = narrow(acc1 / l_i[:, None], type)
            mean2 = narrow(acc2 / l_i[:, None], type)
            tl.store(out, mean1, mask=is_head[:, None] & in_first[None, :])
            tl.store(out + FIRST, mean2, mask=is_head[:, None] & in_second[None, :])
