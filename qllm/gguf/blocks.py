"""What blocks of GGUF's types hold: integers, scales and offsets, from the bytes of rows.

Blocks are uint8 (N, blocks of a row, bytes of a block).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qllm.errors import UserError

# Both halves of MXFP4's bytes are twice these numbers of E2M1, the upper eight negative.
TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)


class Values(NamedTuple):
    """What rows of blocks hold.

    Attributes:
        q: uint8 (N, K).
        scales: float16 or float32 (N, G).
        offsets: of that shape and type, added to q · scale; None where there is a zero point.
    """

    q: Tensor
    scales: Tensor
    offsets: Tensor | None = None


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block: (N, blocks)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def nibbles(packed: Tensor) -> Tensor:
    """Low halves of some bytes, then their high halves: (…, B) to (…, 2 B)."""
    return torch.cat([packed & 0xF, packed >> 4], -1)


def _fifth_bits(words: Tensor) -> Tensor:
    """Bit i of 32 little-endian bits, moved to bit 4, for each i: uint8 (…, 4) to (…, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((words[..., None] >> shifts) & 1).flatten(-2) << 4


def q4_0(blocks: Tensor) -> Values:
    return Values(nibbles(blocks[..., 2:]).flatten(1), half(blocks, 0))


def q4_1(blocks: Tensor) -> Values:
    return Values(nibbles(blocks[..., 4:]).flatten(1), half(blocks, 0), half(blocks, 2))


def q5_0(blocks: Tensor) -> Values:
    q = nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return Values(q.flatten(1), half(blocks, 0))


def q5_1(blocks: Tensor) -> Values:
    q = nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Values(q.flatten(1), half(blocks, 0), half(blocks, 2))


def q8_0(blocks: Tensor) -> Values:
    return Values((blocks[..., 2:] ^ 0x80).flatten(1), half(blocks, 0))


def _crumbs(packed: Tensor) -> Tensor:
    """Bits 0 and 1 of each of 32 bytes, then bits 2 and 3, …: (…, 32 n) to (…, 128 n)."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    return ((packed.unflatten(-1, (-1, 1, 32)) >> shifts) & 3).flatten(-3)


def q2_k(blocks: Tensor) -> Values:
    """16 bytes of a 4-bit scale and a 4-bit minimum, 64 of values, their two factors."""
    d, dmin = half(blocks, 80).float()[..., None], half(blocks, 82).float()[..., None]
    scales = d * (blocks[..., :16] & 0xF)
    offsets = -(dmin * (blocks[..., :16] >> 4))
    return Values(_crumbs(blocks[..., 16:80]).flatten(1), scales.flatten(1), offsets.flatten(1))


def q3_k(blocks: Tensor) -> Values:
    """32 bytes of third bits, 64 of the others, 12 of 6-bit scales, their factor."""
    thirds = (blocks[..., :32][..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    q = _crumbs(blocks[..., 32:96]) | (thirds.flatten(-2) << 2)
    packed = blocks[..., 96:108]
    low = nibbles(packed[..., :8])
    high = (packed[..., 8:][..., None, :] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]) & 3
    scales = (low | (high.flatten(-2) << 4)).float() - 32
    return Values(q.flatten(1), (half(blocks, 108).float()[..., None] * scales).flatten(1))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each in 12 bytes."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, (third & 0xF) | (first >> 6 << 4)], -1)
    return scales, torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], -1)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K, which begin with two factors and 12 bytes: float32 (N, G) each."""
    scales, minima = _six_bits(blocks[..., 4:16])
    d, dmin = half(blocks, 0).float()[..., None], half(blocks, 2).float()[..., None]
    return (d * scales).flatten(1), -(dmin * minima).flatten(1)


def q4_k(blocks: Tensor) -> Values:
    q = nibbles(blocks[..., 16:].unflatten(-1, (4, 32)))
    return Values(q.flatten(1), *_scales_and_minima(blocks))


def q5_k(blocks: Tensor) -> Values:
    fifths = (blocks[..., 16:48][..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    q = nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-2) | (fifths.flatten(-2) << 4)
    return Values(q.flatten(1), *_scales_and_minima(blocks))


def q6_k(blocks: Tensor) -> Values:
    """128 bytes of low halves, 64 of high pairs, 16 of int8 scales, their factor."""
    low = nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    q = low.flatten(-2) | (_crumbs(blocks[..., 128:192]) << 4)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return Values(q.flatten(1), (half(blocks, 208).float()[..., None] * scales).flatten(1))


def e2m1_levels() -> Tensor:
    """Twice the number of each four bits of E2M1, plus 16: uint8 (16,)."""
    return torch.tensor([16 + sign * n for sign in (1, -1) for n in TWICE_E2M1]).byte()


def e2m1_codes(q: Tensor) -> Tensor:
    """The inverse of `e2m1_levels`: the four bits of each of its numbers, of 0 those of +0."""
    codes, levels = torch.zeros(32, dtype=torch.uint8), e2m1_levels().int()
    for half in (slice(9, 16), slice(0, 8)):
        codes[levels[half]] = torch.arange(half.start, half.stop, dtype=torch.uint8)
    return codes.index_select(0, q.flatten().int()).view(q.shape)


def mxfp4(blocks: Tensor) -> Values:
    """An exponent plus 127, and 16 bytes of values."""
    codes = nibbles(blocks[..., 1:])
    q = e2m1_levels().index_select(0, codes.int().flatten()).view(codes.shape)
    exponents = blocks[..., 0].int() - 128
    return Values(q.flatten(1), torch.ones(exponents.shape).ldexp(exponents))


def tq1_0(blocks: Tensor) -> Values:
    """48 bytes of 5 values in base 3 each, 4 of 4, a factor."""
    q = [
        _base_3(blocks[..., start:stop], count)
        for start, stop, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    return Values(torch.cat(q, -1).flatten(1) + 1, _eight_times(half(blocks, 52)))


def tq2_0(blocks: Tensor) -> Values:
    """64 bytes of values, a factor."""
    q = _crumbs(blocks[..., :64]).flatten(1)
    if q.numel() and q.max() > 2:
        raise UserError("blocks hold other values than -1, 0 and 1; get the file again")
    return Values(q + 1, _eight_times(half(blocks, 64)))


def _base_3(packed: Tensor, count: int) -> Tensor:
    """The first digits of some bytes, then the second ones, …: fractions of 256."""
    powers = 3 ** torch.arange(count, dtype=torch.uint8)[:, None]
    return ((packed[..., None, :] * powers).short() * 3 >> 8).byte().flatten(-2)


def _eight_times(factors: Tensor) -> Tensor:
    """A block's factor (N, blocks) for each 32 of its 256 values."""
    return factors.repeat_interleave(8, 1)
