"""llama.cpp's types whose numbers are drawn from tables, which the `gguf` package has.

What a table holds is integers, so that a layer can hold them as such, with more bits than a file
has: a value is q · scale, or q · scale + offset, as of the other types.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from qllm.errors import UserError
from qllm.gguf.blocks import Values, e2m1_levels, half, nibbles

# Zero points of whole numbers that are not above 62 (IQ2, IQ3_XXS), and 15 (IQ3_S, IQ1_M, NVFP4).
SEVEN_BITS, FIVE_BITS = 64, 16
DELTA = 0.125  # between the grids of IQ1


def _package() -> ModuleType:
    """The `gguf` package's types."""
    try:
        from gguf import quants
    except ImportError:
        raise UserError("the file's types need the package gguf: pip install gguf") from None
    return quants


@cache
def _grid(name: str) -> Tensor:
    """A table of a type: int8, a row of as many numbers as one index stands for."""
    kind = getattr(_package(), name)
    kind.init_grid()
    return torch.from_numpy(kind.grid[0, 0].astype(np.int8))


@cache
def levels() -> Tensor:
    """The number of each four bits of IQ4_NL and IQ4_XS, plus 128: uint8 (16,)."""
    return torch.tensor([level + 128 for level in _package().IQ4_NL.kvalues], dtype=torch.uint8)


@cache
def _signs() -> Tensor:
    """-1 where a bit of a byte is 1, else 1: int8 (256, 8)."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (1 - 2 * bits).to(torch.int8)


@cache
def _even_signs() -> Tensor:
    """Seven signs of bits, and an eighth that leaves an even number of them negative: (128, 8)."""
    signs = _signs()[:128].clone()
    signs[:, 7] = signs[:, :7].prod(1)
    return signs


def _look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table, of 1 to 8 bytes, for some indices (…, I): (…, I R)."""
    # As one integer each, which torch takes from a table many times as fast.
    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[table[0].nbytes]
    found = table.view(wide).flatten().index_select(0, indices.int().flatten())
    return found.view(table.dtype).view(*indices.shape[:-1], -1)


def iq4_nl(blocks: Tensor) -> Values:
    return Values(_look_up(levels(), nibbles(blocks[..., 2:])).flatten(1), half(blocks, 0))


def iq4_xs(blocks: Tensor) -> Values:
    """A factor, the upper 2 bits of 8 scales, their lower 4, then 128 bytes of values."""
    high = blocks[..., 2:4].contiguous().view(torch.int16).int()
    high = (high >> torch.arange(0, 16, 2)) & 3
    low = torch.stack([blocks[..., 4:8] & 0xF, blocks[..., 4:8] >> 4], -1).flatten(-2)
    scales = half(blocks, 0).float()[..., None] * ((low | high << 4).float() - 32)
    q = _look_up(levels(), nibbles(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(-2))
    return Values(q.flatten(1), scales.flatten(1))


def iq3_s(blocks: Tensor) -> Values:
    """A factor, 64 lower bytes of indices, 8 of their ninth bits, 32 of signs, 4 of scales."""
    ninth = _bits(blocks[..., 66:74]).short() << 8
    found = _look_up(_grid("IQ3_S"), blocks[..., 2:66].short() | ninth)
    scales = torch.stack([blocks[..., 106:110] & 0xF, blocks[..., 106:110] >> 4], -1).flatten(-2)
    scales = half(blocks, 0).float()[..., None] * (1 + 2 * scales.float())
    q = found * _look_up(_signs(), blocks[..., 74:106]) + FIVE_BITS
    return Values(q.view(torch.uint8).flatten(1), scales.flatten(1))


def nvfp4(blocks: Tensor) -> Values:
    """4 scales, each a byte of unsigned E4M3, and 8 bytes of values for each."""
    codes = nibbles(blocks[..., 4:].unflatten(-1, (4, 8))).flatten(-2)
    scales = _look_up(_e4m3_halves(), blocks[..., :4])
    return Values(_look_up(e2m1_levels(), codes).flatten(1), scales.flatten(1))


@cache
def _e4m3_halves() -> Tensor:
    """Half of the number of each byte of unsigned E4M3: float16 (256,)."""
    found = _package().NVFP4.ue4m3_to_fp32(np.arange(256, dtype=np.uint8))
    return torch.from_numpy(found.astype(np.float16))


def iq3_xxs(blocks: Tensor) -> Values:
    """A factor, 64 bytes of indices, 8 words of signs and a scale each."""
    found = _look_up(_grid("IQ3_XXS"), blocks[..., 2:66])
    return _with_words(blocks, found, blocks[..., 66:98], 0.5)


def iq2_xxs(blocks: Tensor) -> Values:
    """A factor, and 8 times 4 bytes of indices and a word of signs and a scale."""
    pairs = blocks[..., 2:66].unflatten(-1, (8, 8))
    found = _look_up(_grid("IQ2_XXS"), pairs[..., :4].flatten(-2))
    return _with_words(blocks, found, pairs[..., 4:].flatten(-2), 0.25)


def iq2_xs(blocks: Tensor) -> Values:
    """A factor, 32 times 9 bits of an index and 7 of signs, 16 scales of 4 bits."""
    words = blocks[..., 2:66].contiguous().view(torch.int16).int()
    found = _look_up(_grid("IQ2_XS"), words & 0x1FF)
    q = found * _look_up(_even_signs(), (words >> 9) & 0x7F) + SEVEN_BITS
    return Values(q.view(torch.uint8).flatten(1), _sixteen_scales(blocks, blocks[..., 66:74]))


def iq2_s(blocks: Tensor) -> Values:
    """A factor, 32 lower bytes of indices, 32 of signs, 8 of upper bits, 16 scales of 4 bits."""
    high = (blocks[..., 66:74][..., None] >> torch.arange(0, 8, 2, dtype=torch.uint8)) & 3
    found = _look_up(_grid("IQ2_S"), blocks[..., 2:34].int() | high.flatten(-2).int() << 8)
    q = found * _look_up(_signs(), blocks[..., 34:66]) + SEVEN_BITS
    return Values(q.view(torch.uint8).flatten(1), _sixteen_scales(blocks, blocks[..., 74:82]))


def _sixteen_scales(blocks: Tensor, packed: Tensor) -> Tensor:
    """Scales of 4 bits times a block's factor: float32 (N, G)."""
    four_bits = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).float()
    return (half(blocks, 0).float()[..., None] * (0.5 + four_bits) * 0.25).flatten(1)


def iq1_m(blocks: Tensor) -> Values:
    """32 lower bytes of indices, 32 times 3 upper bits and a sign, 4 words of 4 scales of 3 bits
    and of a quarter of the factor each."""
    upper = torch.stack([blocks[..., 32:48] & 0xF, blocks[..., 32:48] >> 4], -1).flatten(-2).int()
    words = blocks[..., 48:56].contiguous().view(torch.int16).int()
    quarters = ((words >> 12) & 0xF) << torch.arange(0, 16, 4)
    factor = quarters.sum(-1).to(torch.int16).view(torch.float16).float()
    three_bits = ((words[..., None] >> torch.arange(0, 12, 3)) & 7).flatten(-2).float()
    # Eighths, so that what a number and a difference make together is whole.
    scales = factor[..., None] * (2 * three_bits + 1) * DELTA
    found = _look_up(_grid("IQ1_M"), blocks[..., :32].int() | (upper & 7) << 8)
    delta = torch.where(upper & 8 == 0, 1, -1).to(torch.int8)
    eighths = 8 * found.unflatten(-1, (-1, 8)) + delta[..., None]
    return Values((eighths + FIVE_BITS).view(torch.uint8).flatten(1), scales.flatten(1))


def iq1_s(blocks: Tensor) -> Values:
    """A factor, 32 lower bytes of indices, 8 words of their upper bits, a scale and a sign."""
    words = blocks[..., 34:50].contiguous().view(torch.int16).int()
    high = ((words[..., None] >> torch.arange(0, 12, 3)) & 7).flatten(-2)
    q = _look_up(_grid("IQ1_S"), blocks[..., 2:34].int() | high << 8) + 1
    scales = half(blocks, 0).float()[..., None] * (2 * ((words >> 12) & 7) + 1).float()
    delta = torch.where(words < 0, -DELTA, DELTA)
    return Values(q.byte().flatten(1), scales.flatten(1), (scales * (delta - 1)).flatten(1))


def _with_words(blocks: Tensor, found: Tensor, words: Tensor, factor: float) -> Values:
    """Numbers, of each 32 of which a word has four times seven signs, and a scale of four bits."""
    words = words.contiguous().view(torch.int32)
    seven = (words[..., None] >> torch.arange(0, 28, 7, dtype=torch.int32)) & 0x7F
    scales = half(blocks, 0).float()[..., None] * (0.5 + ((words >> 28) & 0xF).float()) * factor
    q = found * _look_up(_even_signs(), seven.flatten(-2)) + SEVEN_BITS
    return Values(q.view(torch.uint8).flatten(1), scales.flatten(1))


def _bits(packed: Tensor) -> Tensor:
    """Bits 0 to 7 of each byte: (…, B) to (…, 8 B)."""
    return ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2)
