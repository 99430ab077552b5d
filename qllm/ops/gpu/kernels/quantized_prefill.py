"""Attention to a cache of 8 or 4 bits, `qllm.ops.quantized_kv`, and to the new tokens themselves.

A token sees the runs before its own as integers, and its own as it came: so all tokens of a pass
lie in the activations' type first, in runs; then whole runs are quantized; then tokens attend.
"""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.attention import rotated
from qllm.ops.gpu.kernels.codes import RUN, quantize_keys, quantize_values
from qllm.ops.gpu.kernels.numbers import bound, narrow, operand
from qllm.ops.gpu.kernels.prefill import weigh


@triton.jit
def _sequence(starts, positions, sequence):
    """Of a sequence: its first token, how many there are, how many come before, and its area.

    An area begins at the run that the first token is in.
    """
    begin = tl.load(starts + sequence)
    tokens = (tl.load(starts + sequence + 1) - begin).to(tl.int32)
    past = tl.load(positions + begin).to(tl.int32)
    return begin, tokens, past, begin + sequence * RUN


@triton.jit(do_not_specialize=["slots"])
def write_runs(
    qkv, cos, sin, rows, starts, positions, recent_keys, recent_values, q, keys, values, heads,
    kv_heads, slots,
    DIM: tl.constexpr, FIRST: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Put the heads of a token where attention looks for them: a program's work.

    It is a token of a sequence, or one before them in the same run.

    Args:
        qkv, cos, sin, rows, starts, positions, q: as `prefill.write_tokens` has them.
        recent_keys, recent_values: (R, H_kv, RUN, D), of the cache.
        keys, values: (H_kv, slots, D): an area of each sequence, its tokens in whole runs.
    """
    type: tl.constexpr = qkv.dtype.element_ty
    sequence = tl.program_id(1)
    begin, tokens, past, area = _sequence(starts, positions, sequence)
    place_in_area = tl.program_id(0)
    before = past % RUN
    token = begin + place_in_area - before
    if place_in_area >= before + tokens:
        return
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF)
    in_first, in_second = (column < FIRST)[None, :], (column < DIM - FIRST)[None, :]
    kv_head = (head - heads) % kv_heads
    is_key = ((head >= heads) & (head < heads + kv_heads))[:, None]
    is_value = ((head >= heads + kv_heads) & (head < heads + 2 * kv_heads))[:, None]
    target = (kv_head.to(tl.int64) * slots + area + place_in_area) * DIM
    target = target[:, None] + column[None, :]
    if place_in_area < before:
        row = tl.load(rows + sequence)
        held = ((row * kv_heads + kv_head) * RUN + place_in_area) * DIM
        held = held[:, None] + column[None, :]
        a = tl.load(recent_keys + held, mask=is_key & in_first, other=0.0)
        b = tl.load(recent_keys + held + FIRST, mask=is_key & in_second, other=0.0)
        c = tl.load(recent_values + held, mask=is_value & in_first, other=0.0)
        d = tl.load(recent_values + held + FIRST, mask=is_value & in_second, other=0.0)
        tl.store(keys + target, a, mask=is_key & in_first)
        tl.store(keys + target + FIRST, b, mask=is_key & in_second)
        tl.store(values + target, c, mask=is_value & in_first)
        tl.store(values + target + FIRST, d, mask=is_value & in_second)
    else:
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
        queries = q + token * heads * DIM + (head * DIM)[:, None] + column[None, :]
        tl.store(queries, a, mask=is_query & in_first)
        tl.store(queries + FIRST, b, mask=is_query & in_second)
        tl.store(keys + target, a, mask=is_key & in_first)
        tl.store(keys + target + FIRST, b, mask=is_key & in_second)
        tl.store(values + target, a, mask=is_value & in_first)
        tl.store(values + target + FIRST, b, mask=is_value & in_second)


@triton.jit(do_not_specialize=["slots"])
def quantize_runs(
    keys, values, rows, starts, positions, recent_keys, recent_values, key_codes, value_codes,
    key_scales, value_scales, key_zeros, value_zeros, kv_heads, slots, capacity,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Quantize a run of a sequence, if it is whole; the last one joins the newest run of the cache.

    A program takes a run and a key head. CHANNELS is D or the next power of two.

    Args:
        keys, values: of `write_runs`.
    """
    run, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, tokens, past, area = _sequence(starts, positions, sequence)
    first = past // RUN * RUN + run * RUN  # its first token's position
    end = past + tokens
    if first < end:
        item = tl.load(rows + sequence) * kv_heads + kv_head
        place = (kv_head.to(tl.int64) * slots + area + run * RUN) * DIM
        channel = tl.arange(0, CHANNELS)
        within = channel < DIM
        if first + RUN <= end:
            at = item * (capacity // RUN) + first % capacity // RUN
            of_keys = (key_codes, key_scales, key_zeros)
            of_values = (value_codes, value_scales, value_zeros)
            quantize_keys(keys + place, of_keys, at, channel, within, DIM, WIDTH, BITS)
            quantize_values(values + place, of_values, at, DIM, CHANNELS, WIDTH, BITS)
        if first + RUN >= end:
            token = tl.arange(0, RUN)
            cells = token[:, None] * DIM + channel[None, :]
            known = (first + token < end)[:, None] & within[None, :]
            held = item * RUN * DIM + cells
            tl.store(recent_keys + held, tl.load(keys + place + cells, mask=known), mask=known)
            tl.store(recent_values + held, tl.load(values + place + cells, mask=known), mask=known)


@triton.jit
def _load_block(
    codes, run, first, column, within, KEYS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr, COLUMNS: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """BN tokens of a run of integers from the first one on, as numbers (BN, COLUMNS) in a type.

    Args:
        codes: words of four integers of 8 bits or eight of 4, their scales and zeros.
        column: those of a head, of which some are within it.
    """
    words, scales, zeros = codes
    slots: tl.constexpr = RUN * BITS // 8
    fours, slot, token = tl.arange(0, 4), first % slots, first + tl.arange(0, BN)
    words += run * (slots * WIDTH // 4)
    shift = fours * 8 + first // slots * 4
    if KEYS:  # four channels of a token to a word
        channels = tl.arange(0, COLUMNS // 4)
        at = (channels * slots)[None, :] + (slot + tl.arange(0, BN))[:, None]
        word = tl.load(words + at, mask=(channels * 4 < WIDTH)[None, :], other=0)
        integers = word[:, :, None] >> shift[None, None, :]
        scale = tl.load(scales + run * WIDTH + column, mask=within, other=0.0)[None, :]
        zero = tl.load(zeros + run * WIDTH + column, mask=within, other=0)[None, :]
    else:  # four tokens of a channel
        rows = slot // 4 + tl.arange(0, BN // 4)
        at = (rows * WIDTH)[:, None] + column[None, :]
        word = tl.load(words + at, mask=within[None, :], other=0)
        integers = word[:, None, :] >> shift[None, :, None]
        scale = tl.load(scales + run * RUN + token)[:, None]
        zero = tl.load(zeros + run * RUN + token)[:, None]
    integers = tl.reshape(integers & ((1 << BITS) - 1), (BN, COLUMNS))
    base: tl.constexpr = 0 if BITS == 8 else 127
    integers = integers - (zero.to(tl.int32) - base)
    return narrow(integers.to(tl.float32) * scale.to(tl.float32), type)


@triton.jit(do_not_specialize=["slots"])
def prefill_attention(
    q, keys, values, key_codes, value_codes, key_scales, value_scales, key_zeros, value_zeros,
    slopes, rows, starts, positions, y, heads, kv_heads, slots, capacity, scale, cap, window,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, BN: tl.constexpr, SLOPE: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A program takes a run's tokens of a sequence, and TOGETHER heads that read the same keys.

    Keys come in blocks of BN, which are parts of runs: what a token sums, and in which order, does
    not depend on the other sequences, nor on the pieces in which its own sequence comes.

    Args:
        q, y: (N, H, D), D = DIM padded to COLUMNS here, and to WIDTH among the integers.
        keys, values: of `write_runs`.
        key_codes, value_codes: of the cache, four bytes to an int32.
    """
    type: tl.constexpr = q.dtype.element_ty
    block, sequence = tl.program_id(0), tl.program_id(2)
    begin, tokens, past, area = _sequence(starts, positions, sequence)
    first_run = past // RUN * RUN
    first, end = first_run + block * RUN, past + tokens  # positions
    if first < end:
        i, n, column = tl.arange(0, RUN * TOGETHER), tl.arange(0, BN), tl.arange(0, COLUMNS)
        head, position = tl.program_id(1) * TOGETHER + i // RUN, first + i % RUN
        kv_head = tl.program_id(1) * TOGETHER // GROUP
        within = column < DIM
        place = ((begin + position - past) * heads + head)[:, None] * DIM + column[None, :]
        inside = ((position >= past) & (position < end))[:, None] & within[None, :]
        queries = operand(tl.load(q + place, mask=inside, other=0.0))
        slope = tl.zeros((RUN * TOGETHER,), tl.float32)
        if SLOPE:
            slope = tl.load(slopes + head)
        m_i = tl.full((RUN * TOGETHER,), float("-inf"), tl.float32)
        l_i = tl.zeros((RUN * TOGETHER,), tl.float32)
        acc = tl.zeros((RUN * TOGETHER, COLUMNS), tl.float32)
        begin_key = past * 0
        if WINDOW:
            begin_key = tl.minimum(tl.maximum(first + 1 - window, 0) // BN * BN, first)
        item = tl.load(rows + sequence) * kv_heads + kv_head
        of_keys = (key_codes, key_scales, key_zeros)
        of_values = (value_codes, value_scales, value_zeros)
        for start in range(bound(begin_key), bound(first), BN):
            held = start % capacity  # which is in whole runs
            run = item * (capacity // RUN) + held // RUN
            k = _load_block(
                of_keys, run, held % RUN, column, within, True, WIDTH, BITS, BN, COLUMNS, type
            )
            distance = (start + n)[None, :] - position[:, None]
            how = (scale, cap, window, slope[:, None])
            weights, alpha, state = weigh(
                queries, k, distance, how, (m_i, l_i), SLOPE, CAP, WINDOW, type
            )
            m_i, l_i = state
            v = operand(
                _load_block(
                    of_values,
                    run,
                    held % RUN,
                    column,
                    within,
                    False,
                    WIDTH,
                    BITS,
                    BN,
                    COLUMNS,
                    type,
                )
            )
            acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
        own = (kv_head.to(tl.int64) * slots + area - first_run) * DIM
        for start in range(bound(first), bound(tl.minimum(first + RUN, end)), BN):
            token = start + n
            there = own + token[:, None] * DIM + column[None, :]
            known = (token < end)[:, None] & within[None, :]
            k = tl.load(keys + there, mask=known, other=0.0)
            distance = token[None, :] - position[:, None]
            how = (scale, cap, window, slope[:, None])
            weights, alpha, state = weigh(
                queries, k, distance, how, (m_i, l_i), SLOPE, CAP, WINDOW, type
            )
            m_i, l_i = state
            v = operand(tl.load(values + there, mask=known, other=0.0))
            acc = tl.dot(weights, v, acc * alpha[:, None], input_precision="ieee")
        tl.store(y + place, narrow(acc / l_i[:, None], type), mask=inside)
