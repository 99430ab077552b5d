"""Keys and values of 8 and 4 bits, as `qllm.ops.quantized_kv` has them: read, and made of a run."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.numbers import INTERPRETED, narrow, operand

RUN = tl.constexpr(64)


@triton.jit
def in_words(codes):
    """Pointers to integers, scales and zeros, as such to int32."""
    word: tl.constexpr = tl.pointer_type(tl.int32)
    return (
        codes[0].to(word, bitcast=True), codes[1].to(word, bitcast=True),
        codes[2].to(word, bitcast=True),
    )  # fmt: skip


@triton.jit
def _load_fours(scales, zeros, at):
    """Of four integers in turn: pairs of scales in a word each, and of four zeros the word."""
    return tl.load(scales + at * 2), tl.load(scales + at * 2 + 1), tl.load(zeros + at)


@triton.jit
def _from_2_15(word, magic, BYTE: tl.constexpr):
    """2^15 and a byte of a word: float32. It is one instruction."""
    if INTERPRETED:
        bits = ((word >> (8 * BYTE) & 255) << 8) | 0x47000000
    else:
        # Bytes 0, 2 and 3 are those of the other word, from 4 on.
        order: tl.constexpr = f"prmt.b32 $0, $1, $2, 0x75{BYTE}4;"
        bits = tl.inline_asm_elementwise(
            order, "=r,r,r", [word, magic], tl.int32, is_pure=True, pack=1
        )
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _magic(run):
    """2^15 as float32's bits, which the compiler keeps in a register as it does not know them."""
    return (run >> 62).to(tl.int32) | 0x47000000


@triton.jit
def _one_of_four(fours, magic, BYTE: tl.constexpr, BITS: tl.constexpr):
    """The scale of one of four, and what is taken from 2^15 and its integer, times the scale.

    Scales are of 8 bits, so that all products are exact.
    """
    low, high, zeros = fours
    pair = low if BYTE < 2 else high
    scale = (pair << 16 if BYTE % 2 == 0 else pair & -65536).to(tl.float32, bitcast=True)
    base: tl.constexpr = 0.0 if BITS == 8 else 127.0
    return scale, (_from_2_15(zeros, magic, BYTE) - base) * scale


@triton.jit
def multiply_keys(
    q, of_keys, run, QUARTER: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    type: tl.constexpr,
):  # fmt: skip
    """Products of queries and the keys of a run: (M, RUN).

    Args:
        q: of `heads_of_fours`: a word holds four channels of a token.
    """
    words, scales, zeros = of_keys
    magic = _magic(run)
    slots: tl.constexpr = RUN * BITS // 8
    four, token = tl.arange(0, QUARTER), tl.arange(0, RUN)
    if QUARTER * 4 > WIDTH:  # Queries have zeros in channels that are not there.
        four = tl.minimum(four, WIDTH // 4 - 1)
    slot = token[:, None] if BITS == 8 else (token % slots)[:, None]
    word = tl.load(words + run * (slots * WIDTH // 4) + (four * slots)[None, :] + slot)
    if BITS == 4:
        word = word >> (token // slots * 4)[:, None] & 0x0F0F0F0F
    fours = _load_fours(scales, zeros, run * (WIDTH // 4) + four)
    products = tl.zeros((q[0].shape[0], RUN), tl.float32)
    for i in tl.static_range(4):
        scale, less = _one_of_four(fours, magic, i, BITS)
        k = _from_2_15(word, magic, i) * scale[None, :] - less[None, :]
        k = operand(narrow(k, type))
        products = tl.dot(operand(q[i]), tl.trans(k), products, input_precision="ieee")
    return products


@triton.jit
def add_values(
    weights, of_values, run, column, acc, WIDTH: tl.constexpr, BITS: tl.constexpr,
    type: tl.constexpr,
):  # fmt: skip
    """acc and the values of a run, weighed with (M, RUN): a word holds four tokens of a channel."""
    words, scales, zeros = of_values
    magic = _magic(run)
    slots: tl.constexpr = RUN * BITS // 8
    four = tl.arange(0, RUN // 4)
    if column.shape[0] > WIDTH:  # Sums in columns that are not there are not stored.
        column = tl.minimum(column, WIDTH - 1)
    slot = four[:, None] if BITS == 8 else (four % (slots // 4))[:, None]
    word = tl.load(words + run * (slots * WIDTH // 4) + slot * WIDTH + column[None, :])
    if BITS == 4:
        word = word >> (four // (slots // 4) * 4)[:, None] & 0x0F0F0F0F
    fours = _load_fours(scales, zeros, run * (RUN // 4) + four)
    rows: tl.constexpr = weights.shape[0]
    even, odd = tl.split(tl.reshape(weights, (rows, RUN // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    of_tokens = (first, second, third, fourth)
    for i in tl.static_range(4):
        scale, less = _one_of_four(fours, magic, i, BITS)
        v = _from_2_15(word, magic, i) * scale[:, None] - less[:, None]
        v = operand(narrow(v, type))
        acc = tl.dot(operand(of_tokens[i]), v, acc, input_precision="ieee")
    return acc


@triton.jit
def _nearest(x):
    """float32 x to the nearest integer, halves to even: |x| is below 2^22."""
    magic: tl.constexpr = 12582912.0  # 1.5 · 2^23, which leaves no bit for a fraction
    return (x + magic) - magic


@triton.jit
def _grid(low, high, unit, BITS: tl.constexpr):
    """Scale (bfloat16), step and zero of a range; `unit` is NaN where a value is not finite."""
    steps: tl.constexpr = (1 << BITS) - 1
    base: tl.constexpr = 0 if BITS == 8 else 127
    if BITS == 8:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    scale = tl.div_rn(high - low, low * 0 + steps)
    if BITS == 4:
        far = tl.maximum(tl.div_rn(low, low * 0 + 127.0), tl.div_rn(-low, low * 0 + 128.0))
        scale = tl.maximum(scale, far)
    scale = narrow(scale, tl.bfloat16)
    scale = tl.where(scale.to(tl.float32) == 0, narrow(low * 0 + 1.0, tl.bfloat16), scale)
    finite = unit == 1.0
    scale = tl.where(finite, scale, narrow(unit, tl.bfloat16))
    step = tl.where(finite, scale.to(tl.float32), 1.0)
    zero = tl.where(finite, base - _nearest(tl.div_rn(low, step)), 0.0)
    return scale, step, tl.minimum(tl.maximum(zero, 0.0), 255.0)


@triton.jit
def _code(x, step, zero, BITS: tl.constexpr):
    steps: tl.constexpr = (1 << BITS) - 1
    base: tl.constexpr = 0 if BITS == 8 else 127
    code = _nearest(tl.div_rn(x, step)) + (zero - base)
    code = tl.where(code == code, code, 0.0)
    return tl.minimum(tl.maximum(code, 0.0), steps).to(tl.int32)


@triton.jit
def _load_recent(recent, token, channel, within, DIM: tl.constexpr):
    ptrs = recent + token[:, None] * DIM + channel[None, :]
    return tl.load(ptrs, mask=within[None, :], other=0.0).to(tl.float32)


@triton.jit
def quantize_keys(
    recent, of_keys, run, channel, within,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Some channels (C,) of the keys of a run, recent (RUN, DIM), to their integers."""
    codes, scales, zeros = of_keys
    slots: tl.constexpr = RUN * BITS // 8
    slot = tl.arange(0, slots)
    x = _load_recent(recent, slot, channel, within, DIM)
    behind = x
    if BITS == 4:
        behind = _load_recent(recent, slot + slots, channel, within, DIM)
    low = tl.minimum(tl.min(x, 0), tl.min(behind, 0))
    high = tl.maximum(tl.max(x, 0), tl.max(behind, 0))
    unit = tl.sum(x * 0, 0) + tl.sum(behind * 0, 0) + 1.0
    scale, step, zero = _grid(low, high, unit, BITS)
    found = _code(x, step[None, :], zero[None, :], BITS)
    if BITS == 4:
        found = found | (_code(behind, step[None, :], zero[None, :], BITS) << 4)
    ptrs = codes + run * (slots * WIDTH) + ((channel // 4 * slots)[None, :] + slot[:, None]) * 4
    tl.store(ptrs + (channel % 4)[None, :], found.to(tl.uint8), mask=within[None, :])
    tl.store(scales + run * WIDTH + channel, scale, mask=within)
    tl.store(zeros + run * WIDTH + channel, zero.to(tl.int32).to(tl.uint8), mask=within)


@triton.jit
def _quantize_tokens(
    x, scales, zeros, within, BITS: tl.constexpr
):  # fmt: skip
    """Integers of values (T, C), and their scales and zeros (T,) to their places."""
    low = tl.min(tl.where(within[None, :], x, float("inf")), 1)
    high = tl.max(tl.where(within[None, :], x, float("-inf")), 1)
    scale, step, zero = _grid(low, high, tl.sum(x * 0, 1) + 1.0, BITS)
    tl.store(scales, scale)
    tl.store(zeros, zero.to(tl.int32).to(tl.uint8))
    return _code(x, step[:, None], zero[:, None], BITS)


@triton.jit
def quantize_values(
    recent, of_values, run, slot,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Values of some slots (T,) of a run, recent (RUN, DIM), to their integers."""
    codes, scales, zeros = of_values
    slots: tl.constexpr = RUN * BITS // 8
    channel = tl.arange(0, CHANNELS)
    within = channel < DIM
    token = run * RUN + slot
    x = _load_recent(recent, slot, channel, within, DIM)
    found = _quantize_tokens(x, scales + token, zeros + token, within, BITS)
    if BITS == 4:
        token += slots
        x = _load_recent(recent, slot + slots, channel, within, DIM)
        found = found | (_quantize_tokens(x, scales + token, zeros + token, within, BITS) << 4)
    ptrs = codes + run * (slots * WIDTH)
    ptrs += ((slot // 4 * WIDTH)[:, None] + channel[None, :]) * 4 + (slot % 4)[:, None]
    tl.store(ptrs, found.to(tl.uint8), mask=within[None, :])


@triton.jit
def quantize_run(
    keys, values, of_keys, of_values, run,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A run of keys and values (RUN, DIM) to their integers, of which few are in registers.

    CHANNELS is a power of two.
    """
    slots: tl.constexpr = RUN * BITS // 8
    some: tl.constexpr = 8
    for first in range(0, CHANNELS, some):
        channel = first + tl.arange(0, some)
        quantize_keys(keys, of_keys, run, channel, channel < DIM, DIM, WIDTH, BITS)
    for first in range(0, slots, some):
        slot = first + tl.arange(0, some)
        quantize_values(values, of_values, run, slot, DIM, CHANNELS, WIDTH, BITS)
