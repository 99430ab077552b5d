"""Keys and values of 8 and 4 bits, as `qllm.ops.quantized_kv` has them: read, and made of a run."""

import triton
import triton.language as tl

from qllm.ops.gpu.kernels.numbers import narrow

RUN = tl.constexpr(64)


@triton.jit
def load_held(
    held, codes, how, channel, within, KEYS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr, type: tl.constexpr,
):  # fmt: skip
    """Some channels (C,) of keys or values that a cache holds: (T, C) in a type.

    Args:
        held: those in the type of the activations.
        codes: integers, scales and zeros.
        how: the run, tokens (T,) of it, or of 16 bits of a row, which of them are wanted, and
            whether they are in `held`.
    """
    data, scales, zeros = codes
    run, token, here, is_held = how
    place = held + token[:, None] * DIM + channel[None, :]
    mask = here[:, None] & within[None, :]
    if BITS == 16 or is_held:  # which is known when it is compiled
        found = tl.load(place, mask=mask, other=0.0)
    else:
        slots: tl.constexpr = RUN * BITS // 8
        at = data + run * (slots * WIDTH)
        if KEYS:
            at += ((channel // 4 * slots)[None, :] + (token % slots)[:, None]) * 4
            at += (channel % 4)[None, :]
            scale = tl.load(scales + run * WIDTH + channel, mask=within, other=0.0)[None, :]
            zero = tl.load(zeros + run * WIDTH + channel, mask=within, other=0)[None, :]
        else:
            at += ((token % slots // 4 * WIDTH)[:, None] + channel[None, :]) * 4
            at += (token % 4)[:, None]
            scale = tl.load(scales + run * RUN + token)[:, None]
            zero = tl.load(zeros + run * RUN + token)[:, None]
        integers = tl.load(at, mask=within[None, :], other=0).to(tl.int32)
        if BITS == 4:
            integers = (integers >> (token // slots * 4)[:, None]) & 15
        base: tl.constexpr = 0 if BITS == 8 else 127
        integers = integers - (zero.to(tl.int32) - base)
        found = narrow(integers.to(tl.float32) * scale.to(tl.float32), type)
    return found


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
    place = recent + token[:, None] * DIM + channel[None, :]
    return tl.load(place, mask=within[None, :], other=0.0).to(tl.float32)


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
    place = codes + run * (slots * WIDTH) + ((channel // 4 * slots)[None, :] + slot[:, None]) * 4
    tl.store(place + (channel % 4)[None, :], found.to(tl.uint8), mask=within[None, :])
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
    recent, of_values, run,
    DIM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The values of a run, recent (RUN, DIM), to their integers; CHANNELS is a power of two."""
    codes, scales, zeros = of_values
    slots: tl.constexpr = RUN * BITS // 8
    slot, channel = tl.arange(0, slots), tl.arange(0, CHANNELS)
    within = channel < DIM
    token = run * RUN + slot
    x = _load_recent(recent, slot, channel, within, DIM)
    found = _quantize_tokens(x, scales + token, zeros + token, within, BITS)
    if BITS == 4:
        token += slots
        x = _load_recent(recent, slot + slots, channel, within, DIM)
        found = found | (_quantize_tokens(x, scales + token, zeros + token, within, BITS) << 4)
    place = codes + run * (slots * WIDTH)
    place += ((slot // 4 * WIDTH)[:, None] + channel[None, :]) * 4 + (slot % 4)[:, None]
    tl.store(place, found.to(tl.uint8), mask=within[None, :])
