"""The types of GGUF's tensors: what their blocks hold, and the numbers that these stand for.

A row of a quantized tensor is blocks of 32 values, or, of the K types, of 256. In all of them a
value is q · scale, less a zero point that is the same everywhere, or plus an offset of its group;
groups have 32 or 16 values. Those of 32 are what `WeightOnlyLinear` holds as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qllm.ops.cpu import library, linear
from qllm.quant.packing import PackedWeight, pack

# Groups that the packed layers hold without padding (a K block of the CPU kernels' layout).
PACKED_GROUP = 32
# Rows are dequantized in pieces of about this many values: the temporaries stay in cache.
CHUNK_VALUES = 1 << 18


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


@dataclass(frozen=True)
class BlockType:
    """A type of tensor.

    Attributes:
        number: that a file gives it.
        values, nbytes: of a block; of plain numbers, one of them.
        dtype: of plain numbers, None of a quantized type.
        bits, group: of a quantized type: of an integer, and how many values share a scale.
        unpack: uint8 (N, blocks, nbytes) to `Values`.
    """

    number: int
    name: str
    values: int
    nbytes: int
    dtype: torch.dtype | None = None
    bits: int = 0
    group: int = 0
    unpack: Callable[[Tensor], Values] | None = None
    offset: bool = False

    @property
    def packs(self) -> bool:
        """Whether a layer can hold it as it is."""
        return self.group == PACKED_GROUP

    @property
    def scheme(self) -> str:
        """As `QuantSpec` has it."""
        return "offset" if self.offset else "sym"

    @property
    def zero(self) -> int:
        """The zero point of a type without offsets."""
        return 2 ** (self.bits - 1)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.values * self.nbytes

    def dequantize(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 (N, row_bytes(K)) to numbers (N, K): of `dtype`, or as plain numbers are.

        The products are float32's, in llama.cpp's order: the numbers are its, to the bit, and then
        rounded to `dtype`.
        """
        if self.dtype is not None:
            # Flat in between: a single row has any stride.
            return rows.contiguous().flatten().view(self.dtype).view(len(rows), -1)
        columns = rows.shape[1] // self.nbytes * self.values
        if self is Q8_0 and dtype == torch.float16:
            # The product of two numbers of float16 is a float32, which is rounded once here, too.
            blocks = rows.unflatten(1, (-1, self.nbytes))
            signed = blocks[..., 2:].view(torch.int8)
            return (signed * half(blocks, 0)[..., None]).flatten(1)
        out = torch.empty(len(rows), columns, dtype=dtype)
        step = max(1, CHUNK_VALUES // columns)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            values = self._unpacked(part.unflatten(1, (-1, self.nbytes)))
            numbers = values.q.float().unflatten(1, (-1, self.group))
            if values.offsets is None:
                numbers -= self.zero
            numbers *= values.scales.float()[..., None]
            if values.offsets is not None:
                numbers += values.offsets.float()[..., None]
            out[start : start + step] = numbers.flatten(1)
        return out

    def _unpacked(self, blocks: Tensor) -> Values:
        assert self.unpack is not None  # only plain numbers have none
        return self.unpack(blocks)

    def to_packed(self, rows: Tensor) -> PackedWeight:
        """uint8 (N, row_bytes(K)) as a layer holds them: bit for bit the same weights."""
        blocks = rows.unflatten(1, (-1, self.nbytes))
        if self.name in UNBLOCKED and library.unsupported_reason(rows.device.type) is None:
            return linear.unblock(blocks, self.bits, self.offset)
        q, scales, offsets = self._unpacked(blocks)
        packed = pack(q, self.bits)
        zeros = scales.new_empty(0, dtype=torch.uint8) if offsets is None else offsets
        return PackedWeight(packed, scales.contiguous(), zeros.contiguous())


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block: (N, blocks)."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves of some bytes, then their high halves: (…, B) to (…, 2 B)."""
    return torch.cat([packed & 0xF, packed >> 4], -1)


def _fifth_bits(words: Tensor) -> Tensor:
    """Bit i of 32 little-endian bits, moved to bit 4, for each i: uint8 (…, 4) to (…, 32)."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((words[..., None] >> shifts) & 1).flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Values:
    return Values(_nibbles(blocks[..., 2:]).flatten(1), half(blocks, 0))


def _q4_1(blocks: Tensor) -> Values:
    return Values(_nibbles(blocks[..., 4:]).flatten(1), half(blocks, 0), half(blocks, 2))


def _q5_0(blocks: Tensor) -> Values:
    q = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return Values(q.flatten(1), half(blocks, 0))


def _q5_1(blocks: Tensor) -> Values:
    q = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Values(q.flatten(1), half(blocks, 0), half(blocks, 2))


def _q8_0(blocks: Tensor) -> Values:
    return Values((blocks[..., 2:] ^ 0x80).flatten(1), half(blocks, 0))


def _crumbs(packed: Tensor) -> Tensor:
    """Bits 0 and 1 of each of 32 bytes, then bits 2 and 3, …: (…, 32 n) to (…, 128 n)."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    return ((packed.unflatten(-1, (-1, 1, 32)) >> shifts) & 3).flatten(-3)


def _q2_k(blocks: Tensor) -> Values:
    """16 bytes of a 4-bit scale and a 4-bit minimum, 64 of values, their two factors."""
    d, dmin = half(blocks, 80).float()[..., None], half(blocks, 82).float()[..., None]
    scales = d * (blocks[..., :16] & 0xF)
    offsets = -(dmin * (blocks[..., :16] >> 4))
    return Values(_crumbs(blocks[..., 16:80]).flatten(1), scales.flatten(1), offsets.flatten(1))


def _q3_k(blocks: Tensor) -> Values:
    """32 bytes of third bits, 64 of the others, 12 of 6-bit scales, their factor."""
    thirds = (blocks[..., :32][..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    q = _crumbs(blocks[..., 32:96]) | (thirds.flatten(-2) << 2)
    packed = blocks[..., 96:108]
    low = _nibbles(packed[..., :8])
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


def _q4_k(blocks: Tensor) -> Values:
    q = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32)))
    return Values(q.flatten(1), *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor) -> Values:
    fifths = (blocks[..., 16:48][..., None, :] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    q = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-2) | (fifths.flatten(-2) << 4)
    return Values(q.flatten(1), *_scales_and_minima(blocks))


def _q6_k(blocks: Tensor) -> Values:
    """128 bytes of low halves, 64 of high pairs, 16 of int8 scales, their factor."""
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    q = low.flatten(-2) | (_crumbs(blocks[..., 128:192]) << 4)
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return Values(q.flatten(1), (half(blocks, 208).float()[..., None] * scales).flatten(1))


# Those that a CPU kernel takes apart.
UNBLOCKED = ("Q4_0", "Q4_1", "Q8_0")
F32 = BlockType(0, "F32", 1, 4, torch.float32)
F16 = BlockType(1, "F16", 1, 2, torch.float16)
BF16 = BlockType(30, "BF16", 1, 2, torch.bfloat16)
Q4_0 = BlockType(2, "Q4_0", 32, 18, None, 4, 32, _q4_0)
Q4_1 = BlockType(3, "Q4_1", 32, 20, None, 4, 32, _q4_1, offset=True)
Q5_0 = BlockType(6, "Q5_0", 32, 22, None, 5, 32, _q5_0)
Q5_1 = BlockType(7, "Q5_1", 32, 24, None, 5, 32, _q5_1, offset=True)
Q8_0 = BlockType(8, "Q8_0", 32, 34, None, 8, 32, _q8_0)
TYPES = {
    kind.number: kind
    for kind in (
        F32,
        F16,
        BF16,
        Q4_0,
        Q4_1,
        Q5_0,
        Q5_1,
        Q8_0,
        BlockType(10, "Q2_K", 256, 84, None, 2, 16, _q2_k, offset=True),
        BlockType(11, "Q3_K", 256, 110, None, 3, 16, _q3_k),
        BlockType(12, "Q4_K", 256, 144, None, 4, 32, _q4_k, offset=True),
        BlockType(13, "Q5_K", 256, 176, None, 5, 32, _q5_k, offset=True),
        BlockType(14, "Q6_K", 256, 210, None, 6, 16, _q6_k),
    )
}
# Those that llama.cpp has besides, and after which its users call their files.
OTHER_TYPES = {
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S"), 16)),
    **{22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    **{39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
# By name, those that layers hold as they are.
PACKED = {kind.name: kind for kind in TYPES.values() if kind.packs}
