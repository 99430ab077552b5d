"""The types of GGUF's tensors: what their blocks hold, and the numbers that these stand for.

A row of a quantized tensor is blocks of 32 values, or, of the K types, of 256. In all of them a
value is q · scale, less a zero point that is the same everywhere, or plus an offset of its group;
groups have 32 or 16 values. `WeightOnlyLinear` holds them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.gguf import blocks as plain
from qllm.gguf import i_quants
from qllm.gguf.blocks import Values, half
from qllm.ops.cpu import library, linear
from qllm.quant.packing import PackedWeight, pack, unpack

# Of the types of blocks that are written.
WRITTEN_GROUP = 32
# Rows are dequantized in pieces of about this many values: the temporaries stay in cache.
CHUNK_VALUES = 1 << 18
# So many are packed at a time: in between each takes some bytes.
PACKED_VALUES = 1 << 22


@dataclass(frozen=True)
class BlockType:
    """A type of tensor.

    Attributes:
        number: that a file gives it.
        values, nbytes: of a block; of plain numbers, one of them.
        dtype: of plain numbers, None of a quantized type.
        bits, group: of a quantized type: of an integer, and how many values share a scale.
        unpack: uint8 (N, blocks, nbytes) to `Values`, of a quantized type.
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
        return self.unpack is not None

    @property
    def held_bits(self) -> int:
        """Bits of an integer, as CPU kernels hold it: of those out of a table which one it is."""
        return linear.LEVEL_BITS if self.name in FEW_INTEGERS else self.bits

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
        assert self.unpack is not None  # of plain numbers there are no integers
        return self.unpack(blocks)

    def to_packed(self, rows: Tensor) -> PackedWeight:
        """uint8 (N, row_bytes(K)) as a layer holds them: bit for bit the same weights."""
        blocks = rows.unflatten(1, (-1, self.nbytes))
        if self.name in UNBLOCKED and library.unsupported_reason(rows.device.type) is None:
            levels = LEVELS[self.name]() if self.name in LEVELS else blocks.new_empty(0)
            shape = (self.number, self.values, self.group, self.bits)
            halves = self.name in HALVES
            return linear.unblock(blocks, *shape, halves=halves, offset=self.offset, levels=levels)
        step = max(1, PACKED_VALUES // (blocks.shape[1] * self.values))
        found = []
        for part in blocks.split(step):
            q, scales, offsets = self._unpacked(part)
            zeros = scales.new_empty(0, dtype=torch.uint8) if offsets is None else offsets
            found.append((pack(q, self.bits), scales, zeros))
        packed, scales, zeros = (torch.cat(each) for each in zip(*found, strict=True))
        return PackedWeight(packed, scales, zeros)


@dataclass(frozen=True)
class MixedType:
    """What parts of several types are in one matrix: integers of the most bits that one has, in the
    smallest groups, and offsets where one has them.

    Attributes:
        kinds: of the parts, each of which `packs`.
    """

    kinds: tuple[BlockType, ...]

    @property
    def name(self) -> str:
        """Of all of them."""
        return "+".join(sorted({kind.name for kind in self.kinds}))

    @property
    def bits(self) -> int:
        """Of an integer."""
        return max(kind.bits for kind in self.kinds)

    @property
    def group(self) -> int:
        """How many values share a scale."""
        return min(kind.group for kind in self.kinds)

    @property
    def offset(self) -> bool:
        """Whether there are offsets."""
        return any(kind.offset for kind in self.kinds)

    # Of a part, uint8 (N, row_bytes(K)), each by itself: a matrix is loaded tensor by tensor, and
    # packing integers anew takes the longest.

    def qweight(self, kind: BlockType, rows: Tensor) -> Tensor:
        """Its integers, uint8 (N, packed_size(K)), with the bits and the zero point of all."""
        packed = kind.to_packed(rows).qweight
        columns = rows.shape[1] // kind.nbytes * kind.values
        added = 0 if self.offset else 2 ** (self.bits - 1) - kind.zero
        if (kind.bits, added) == (self.bits, 0):
            return packed
        step = max(1, PACKED_VALUES // columns)
        parts = (unpack(part, kind.bits, columns) for part in packed.split(step))
        return torch.cat([pack(values + added, self.bits) for values in parts])

    def scales(self, kind: BlockType, rows: Tensor) -> Tensor:
        """Its scales (N, G), in float32, which those of some parts are."""
        return self._of_groups(kind, kind.to_packed(rows).scales)

    def offsets(self, kind: BlockType, rows: Tensor) -> Tensor:
        """Its offsets (N, G), in float32."""
        packed = kind.to_packed(rows)
        numbers = packed.qzeros if kind.offset else -kind.zero * packed.scales.float()
        return self._of_groups(kind, numbers)

    def _of_groups(self, kind: BlockType, numbers: Tensor) -> Tensor:
        """Those of a part's groups, for each of the smaller ones of all."""
        return numbers.float().repeat_interleave(kind.group // self.group, 1)


# Those that a CPU kernel takes apart; of these those with scales that are float16 in a block, and
# those with a table of what four bits are.
HALVES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
LEVELS: dict[str, Callable[[], Tensor]] = {
    "IQ4_NL": i_quants.levels,
    "IQ4_XS": i_quants.levels,
    "MXFP4": plain.e2m1_levels,
}
# Those of 5 to 8 bits that have 16 different integers at the most.
FEW_INTEGERS = (
    *("IQ4_NL", "IQ4_XS", "IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M"),
    *("MXFP4", "NVFP4"),
)
UNBLOCKED = (*HALVES, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4")
F32 = BlockType(0, "F32", 1, 4, torch.float32)
F16 = BlockType(1, "F16", 1, 2, torch.float16)
BF16 = BlockType(30, "BF16", 1, 2, torch.bfloat16)
Q4_0 = BlockType(2, "Q4_0", 32, 18, None, 4, 32, plain.q4_0)
Q4_1 = BlockType(3, "Q4_1", 32, 20, None, 4, 32, plain.q4_1, offset=True)
Q5_0 = BlockType(6, "Q5_0", 32, 22, None, 5, 32, plain.q5_0)
Q5_1 = BlockType(7, "Q5_1", 32, 24, None, 5, 32, plain.q5_1, offset=True)
Q8_0 = BlockType(8, "Q8_0", 32, 34, None, 8, 32, plain.q8_0)
MXFP4 = BlockType(39, "MXFP4", 32, 17, None, 5, 32, plain.mxfp4)
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
        BlockType(10, "Q2_K", 256, 84, None, 2, 16, plain.q2_k, offset=True),
        BlockType(11, "Q3_K", 256, 110, None, 3, 16, plain.q3_k),
        BlockType(12, "Q4_K", 256, 144, None, 4, 32, plain.q4_k, offset=True),
        BlockType(13, "Q5_K", 256, 176, None, 5, 32, plain.q5_k, offset=True),
        BlockType(14, "Q6_K", 256, 210, None, 6, 16, plain.q6_k),
        BlockType(16, "IQ2_XXS", 256, 66, None, 7, 32, i_quants.iq2_xxs),
        BlockType(17, "IQ2_XS", 256, 74, None, 7, 16, i_quants.iq2_xs),
        BlockType(18, "IQ3_XXS", 256, 98, None, 7, 32, i_quants.iq3_xxs),
        BlockType(19, "IQ1_S", 256, 50, None, 2, 32, i_quants.iq1_s, offset=True),
        BlockType(20, "IQ4_NL", 32, 18, None, 8, 32, i_quants.iq4_nl),
        BlockType(21, "IQ3_S", 256, 110, None, 5, 32, i_quants.iq3_s),
        BlockType(22, "IQ2_S", 256, 82, None, 7, 16, i_quants.iq2_s),
        BlockType(23, "IQ4_XS", 256, 136, None, 8, 32, i_quants.iq4_xs),
        BlockType(29, "IQ1_M", 256, 56, None, 5, 16, i_quants.iq1_m),
        BlockType(34, "TQ1_0", 256, 54, None, 2, 32, plain.tq1_0),
        BlockType(35, "TQ2_0", 256, 66, None, 2, 32, plain.tq2_0),
        MXFP4,
        BlockType(40, "NVFP4", 64, 36, None, 5, 16, i_quants.nvfp4),
    )
}
# Those that llama.cpp has besides, and after which its users call their files.
OTHER_TYPES = {28: "F64", 41: "Q1_0"}
# By name, those that layers hold as they are.
PACKED = {kind.name: kind for kind in TYPES.values() if kind.packs}
