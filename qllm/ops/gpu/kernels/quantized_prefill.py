"""Attention to a cache of 8 or 4 bits, `qllm.ops.quantized_kv`, and to the new tokens themselves.

A token sees the runs before its own as integers, and its own as it came: so all tokens of a pass
lie in the activations' type first, in runs; then whole runs are quantized; then tokens attend.
"""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.codes import RUN, quantize_keys, quantize_values
from qllm.ops.gpu.kernels.numbers import narrow
from qllm.ops.gpu.kernels.prefill import new_heads


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
    qkv, cos, sin, rows, starts, positions, recent_keys, recent_values, keys, values, heads,
    kv_heads, slots,
    DIM: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, KV_HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Put keys and values of a token where attention looks for its own run: a program's work.

    It is a token of a sequence, or one before them in the same run.

    Args:
        qkv, cos, sin, rows, starts, positions: as `prefill.write_tokens` has them.
        recent_keys, recent_values: (R, H_kv, RUN, D), of the cache.
        keys, values: (H_kv, slots, D): an area of each sequence, its tokens in whole runs.
    """
    type: tl.constexpr = qkv.dtype.element_ty
    sequence = tl.program_id(1)
    begin, tokens, past, area = _sequence(starts, positions, sequence)
    slot_in_area, before = tl.program_id(0), past % RUN
    if slot_in_area >= before + tokens:
        return
    head, column = tl.arange(0, KV_HEADS), tl.arange(0, COLUMNS)
    mask = (head < kv_heads)[:, None] & (column < DIM)[None, :]
    target = ((head.to(tl.int64) * slots + area + slot_in_area) * DIM)[:, None] + column[None, :]
    if slot_in_area < before:
        row = tl.load(rows + sequence)
        held = (((row * kv_heads + head) * RUN + slot_in_area) * DIM)[:, None] + column[None, :]
        k = tl.load(recent_keys + held, mask=mask, other=0.0)
        v = tl.load(recent_values + held, mask=mask, other=0.0)
        tl.store(keys + target, k, mask=mask)
        tl.store(values + target, v, mask=mask)
    else:
        token = begin + slot_in_area - before
        source = qkv + token * (heads + 2 * kv_heads) * DIM + ((heads + head) * DIM)[:, None]
        k, v = new_heads(source, cos, sin, token, kv_heads, column, mask, DIM, FIRST, ROTATE, type)
        tl.store(keys + target, k, mask=mask)
        tl.store(values + target, v, mask=mask)


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
        offs = (kv_head.to(tl.int64) * slots + area + run * RUN) * DIM
        channel = tl.arange(0, CHANNELS)
        within = channel < DIM
        if first + RUN <= end:
            at = item * (capacity // RUN) + first % capacity // RUN
            of_keys = (key_codes, key_scales, key_zeros)
            of_values = (value_codes, value_scales, value_zeros)
            quantize_keys(keys + offs, of_keys, at, channel, within, DIM, WIDTH, BITS)
            slot = tl.arange(0, RUN * BITS // 8)
            quantize_values(values + offs, of_values, at, slot, DIM, CHANNELS, WIDTH, BITS)
        if first + RUN >= end:
            token = tl.arange(0, RUN)
            cells = token[:, None] * DIM + channel[None, :]
            known = (first + token < end)[:, None] & within[None, :]
            held = item * RUN * DIM + cells
            tl.store(recent_keys + held, tl.load(keys + offs + cells, mask=known), mask=known)
            tl.store(recent_values + held, tl.load(values + offs + cells, mask=known), mask=known)


@triton.jit
def _load_block(
    codes, run, column, within, KEYS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    COLUMNS: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """A run of integers, as numbers (RUN, COLUMNS) in a type.

    Args:
        codes: words of four integers of 8 bits or eight of 4, their scales and zeros.
        column: those of a head, of which some are within it.
    """
    words, scales, zeros = codes
    slots: tl.constexpr = RUN * BITS // 8
    fours = tl.arange(0, 4) * 8
    words += run * (slots * WIDTH // 4)
    if KEYS:  # four channels of a token to a word
        channels, token = tl.arange(0, COLUMNS // 4), tl.arange(0, RUN)
        at = (channels * slots)[None, :] + (token % slots)[:, None]
        word = tl.load(words + at, mask=(channels * 4 < WIDTH)[None, :], other=0)
        integers = word[:, :, None] >> (fours[None, None, :] + (token // slots * 4)[:, None, None])
        scale = tl.load(scales + run * WIDTH + column, mask=within, other=0.0)[None, :]
        zero = tl.load(zeros + run * WIDTH + column, mask=within, other=0)[None, :]
    else:  # four tokens of a channel
        four = tl.arange(0, RUN // 4)
        at = (four % (slots // 4) * WIDTH)[:, None] + column[None, :]
        word = tl.load(words + at, mask=within[None, :], other=0)
        shift = fours[None, :] + (four // (slots // 4) * 4)[:, None]
        integers = word[:, None, :] >> shift[:, :, None]
        token = run * RUN + tl.arange(0, RUN)
        scale, zero = tl.load(scales + token)[:, None], tl.load(zeros + token)[:, None]
    integers = tl.reshape(integers & ((1 << BITS) - 1), (RUN, COLUMNS))
    base: tl.constexpr = 0 if BITS == 8 else 127
    integers = integers - (zero.to(tl.int32) - base)
    return narrow(integers.to(tl.float32) * scale.to(tl.float32), type)


@triton.jit(do_not_specialize=["capacity", "length", "first_sequence"])
def dequantize_runs(
    key_codes, value_codes, key_scales, value_scales, key_zeros, value_zeros, rows, starts,
    positions, keys, values, kv_heads, capacity, length, first_sequence, window,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Make numbers of a whole run of integers that a sequence's tokens see: a program's work.

    A run is read by all blocks of queries behind it, and unpacking takes longer than reading.

    Args:
        key_codes, value_codes: of the cache, four bytes to an int32.
        keys, values: (B, H_kv, length, D) of the sequences from first_sequence on, a token at its
            position modulo length.
    """
    type: tl.constexpr = keys.dtype.element_ty
    kv_head, sequence = tl.program_id(1), tl.program_id(2) + first_sequence
    _, tokens, past, _ = _sequence(starts, positions, sequence)
    first = tl.program_id(0) * RUN
    if WINDOW:
        first += tl.maximum(past + 1 - window, 0) // RUN * RUN
    if first + RUN <= past + tokens:
        item = tl.load(rows + sequence) * kv_heads + kv_head
        run = item * (capacity // RUN) + first % capacity // RUN
        column = tl.arange(0, COLUMNS)
        within = column < DIM
        offs = (tl.program_id(2) * kv_heads + kv_head).to(tl.int64) * length + first % length
        cells = offs * DIM + tl.arange(0, RUN)[:, None] * DIM + column[None, :]
        of_keys = (key_codes, key_scales, key_zeros)
        found = _load_block(of_keys, run, column, within, True, WIDTH, BITS, COLUMNS, type)
        tl.store(keys + cells, found, mask=within[None, :])
        of_values = (value_codes, value_scales, value_zeros)
        found = _load_block(of_values, run, column, within, False, WIDTH, BITS, COLUMNS, type)
        tl.store(values + cells, found, mask=within[None, :])
