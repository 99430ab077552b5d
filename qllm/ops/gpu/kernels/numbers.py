"""Numbers in 16 bits, which Triton's interpreter takes for integers where they are bfloat16."""

import triton
import triton.language as tl

# There is no inline assembly in the interpreter, either.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def bound(x):
    """One number as a bound of `range`, for which Triton 3.6's interpreter has an array."""
    if INTERPRETED:
        return x.handle.data.item()
    return x


@triton.jit
def operand(x):
    """x as a product takes it."""
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def narrow(x, type: tl.constexpr):
    """float32 x to a type, rounded to the nearest, halves to even."""
    if INTERPRETED and type == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(type)


@triton.jit
def let_next_begin(LATE: tl.constexpr):
    """The kernel behind may begin, if it is launched so; it waits for this one by itself.

    Args:
        LATE: this one is launched so too, and calls `wait_for_previous`.
    """
    if LATE and not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(LATE: tl.constexpr):
    """Behind it, what the kernel in front writes is there, and may be written over."""
    if LATE and not INTERPRETED:
        tl.extra.cuda.gdc_wait()
