"""How the GPU kernels want a packed weight, and the way back; in torch ops, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.ops.gpu import device
from qllm.ops.gpu.device import settle
from qllm.quant.packing import PackedWeight, group_width
from qllm.quant.packing import pack as pack_rows
from qllm.quant.packing import unpack as unpack_rows

PANEL = 16  # output channels that lie together
BLOCK, UNIT = 128, 32  # input channels that lie together, and the fewest that have one scale
LANES = 32  # of a warp, which share a block of a panel
PARTS = (8, 4, 2, 1)  # widths of which every number of bits is a sum of different ones
CHUNK = 1 << 24  # values that are repacked at a time
LOOKED_UP_AT_ONCE = 256  # values of a row, by one program


class Shape(NamedTuple):
    """Of a weight in the kernels' layout.

    Attributes:
        group: inputs that share a scale.
        padded_size: what a group is filled up to: a power of two from UNIT on, or whole BLOCKs.
        groups: of a row.
        blocks: of a row, the last of which may be larger than is needed.
        panels: of PANEL output channels each.
    """

    group: int
    padded_size: int
    groups: int
    blocks: int
    panels: int

    @classmethod
    def of(cls, in_features: int, out_features: int, group_size: int) -> Shape:
        group = group_width(in_features, group_size)
        if group >= BLOCK:
            padded_size = -(-group // BLOCK) * BLOCK
        else:
            padded_size = max(UNIT, 1 << (group - 1).bit_length())
        groups = -(-in_features // group)
        blocks, panels = -(-groups * padded_size // BLOCK), -(-out_features // PANEL)
        return cls(group, padded_size, groups, blocks, panels)

    @property
    def span(self) -> int:
        """Inputs of a block that share a scale."""
        return min(self.padded_size, BLOCK)

    @property
    def pads_groups(self) -> bool:
        """Whether groups have gaps between them, which x then needs as well."""
        return self.groups > 1 and self.padded_size != self.group

    def pad_groups(self, x: Tensor) -> Tensor:
        """x (M, K) with each group at the beginning of its `padded_size` inputs, then zeros."""
        x = pad(x, (0, self.groups * self.group - x.shape[1])).unflatten(1, (-1, self.group))
        return pad(x, (0, self.padded_size - self.group)).flatten(1)


def packed_nbytes(weight: PackedWeight, bits: int, group_size: int, in_features: int) -> int:
    """Bytes of what `pack` makes of a weight, which may be on the meta device."""
    shape = Shape.of(in_features, len(weight.qweight), group_size)
    of_group = sum(tensor.dtype.itemsize for tensor in weight[1:3] if tensor.numel())
    block = PANEL * BLOCK * bits // 8
    return shape.panels * (shape.blocks * block + shape.groups * PANEL * of_group)


def pack(weight: PackedWeight, bits: int, group_size: int, in_features: int) -> PackedWeight:
    """A weight (N, K) in the kernels' layout.

    It is that of the matrix units' operands (mma.m16n8k16): of a block of a panel, lane 4 g + t of
    a warp holds of rows g and g + 8 the inputs 8 t to 8 t + 7 of each UNIT, 16 pairs of a row.
    Values come part by part: a part holds p bits of each, p being 8, 4, 2 or 1, the lower bits in
    the wider part. Of a row's pairs, word w of p holds in its bits [j p, (j + 1) p) the first value
    of pair w (16 / p) + j, and 16 bits further up the second. A lane's 2 p words, row g's first,
    lie in pieces of up to four, each of all lanes.

    Returns:
        qweight int32 (panels, blocks, 64 bits): part after part; scales (G, panels PANEL), rows g
        and g + 8 of a panel side by side, and qzeros uint8 of that shape, or empty.
    """
    shape = Shape.of(in_features, len(weight.qweight), group_size)
    step = max(1, CHUNK // (shape.blocks * BLOCK * PANEL)) * PANEL
    packed = [
        _words(unpack_rows(rows, bits, in_features), bits, shape)
        for rows in weight.qweight.split(step)
    ]
    scales, zeros = (
        _by_lane(tensor, shape.panels) if tensor.numel() else tensor for tensor in weight[1:3]
    )
    whole = PackedWeight(torch.cat(packed), scales, zeros)
    settle(whole.qweight)
    return whole


def unpack(
    packed: PackedWeight, bits: int, group_size: int, in_features: int, out_features: int
) -> PackedWeight:
    """The inverse of `pack`."""
    shape = Shape.of(in_features, out_features, group_size)
    step = max(1, CHUNK // (shape.blocks * BLOCK * PANEL))
    rows = [
        pack_rows(_values(words, bits, shape)[:, :in_features], bits)
        for words in packed.qweight.split(step)
    ]
    scales, zeros = (
        _by_row(tensor, out_features) if tensor.numel() else tensor for tensor in packed[1:3]
    )
    return PackedWeight(torch.cat(rows)[:out_features], scales, zeros)


def look_up(
    index: Tensor,
    packed: PackedWeight,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.packed_embedding` on tensors of `pack`, of N rows; the index is not checked."""
    from qllm.ops.gpu.kernels.embedding import look_up_rows

    shape = Shape.of(in_features, out_features, group_size)
    out = packed.scales.new_empty(len(index), in_features, dtype=dtype)
    if not len(index):
        return out
    grid = len(index), -(-in_features // LOOKED_UP_AT_ONCE)
    zeros = packed.qzeros
    with device.current(out):
        look_up_rows[grid](
            index.to(torch.int64), packed.qweight, packed.scales,
            zeros if zeros.numel() else packed.qweight, out, in_features, shape.blocks,
            packed.scales.stride(0), BITS=bits, GROUP=shape.group, PADDED=shape.padded_size,
            HAS_ZEROS=zeros.numel() > 0, OFFSETS=zeros.is_floating_point(),
            AT_ONCE=LOOKED_UP_AT_ONCE,
            enable_fp_fusion=False,  # a product is rounded before an offset is added
        )  # fmt: skip
    return out


def _words(values: Tensor, bits: int, shape: Shape) -> Tensor:
    """Rows of values, uint8 (R, K), as words (ceil(R / PANEL), blocks, 64 bits)."""
    values = shape.pad_groups(values)
    columns = shape.blocks * BLOCK - values.shape[1]
    values = pad(values, (0, columns, 0, -len(values) % PANEL)).to(torch.int32)
    # Panel, half of it, g, block, unit, t, pair, which of two.
    values = values.view(-1, 2, 8, shape.blocks, 4, 4, 4, 2)
    pairs = values.permute(0, 3, 2, 5, 1, 4, 6, 7).flatten(
        5, 6
    )  # (panel, block, g, t, half, 16, 2)
    parts, low = [], 0
    for width in _parts(bits):
        part = pairs.bitwise_right_shift(low).bitwise_and_((1 << width) - 1)
        part = part.unflatten(5, (width, 16 // width))
        words = part.new_zeros(part.shape[:6])
        for field in range(16 // width):
            for second in range(2):
                words |= part[..., field, second] << (16 * second + field * width)
        pieces = words.flatten(2, 3).flatten(3).unflatten(3, (-1, min(4, 2 * width)))
        parts.append(pieces.transpose(2, 3).flatten(2))
        low += width
    return torch.cat(parts, dim=-1)


def _values(words: Tensor, bits: int, shape: Shape) -> Tensor:
    """The inverse of `_words`, with the rows that fill the last panel: uint8 (R, G · group)."""
    count = len(words)
    pairs = words.new_zeros(count, shape.blocks, 8, 4, 2, 16, 2, dtype=torch.uint8)
    start = low = 0
    for width in _parts(bits):
        size, piece = 2 * LANES * width, min(4, 2 * width)
        part = words[..., start : start + size].unflatten(2, (-1, LANES, piece)).transpose(2, 3)
        part = part.reshape(count, shape.blocks, 8, 4, 2, width)
        fields = pairs.unflatten(5, (width, 16 // width))
        for field in range(16 // width):
            for second in range(2):
                value = (part >> (16 * second + field * width)) & ((1 << width) - 1)
                fields[..., field, second] |= (value << low).to(torch.uint8)
        start, low = start + size, low + width
    pairs = pairs.unflatten(5, (4, 4)).permute(0, 4, 2, 1, 5, 3, 6, 7)
    values = pairs.reshape(count * PANEL, shape.blocks * BLOCK)
    values = values[:, : shape.groups * shape.padded_size].unflatten(1, (-1, shape.padded_size))
    return values[..., : shape.group].flatten(1)


def _by_lane(values: Tensor, panels: int) -> Tensor:
    """Scales or zeros (N, G) as (G, panels PANEL), row g of a panel beside row g + 8."""
    values = pad(values.t(), (0, panels * PANEL - len(values)))
    return values.unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1).contiguous()


def _by_row(values: Tensor, rows: int) -> Tensor:
    """The inverse of `_by_lane`."""
    values = values.unflatten(1, (-1, 8, 2)).transpose(2, 3).flatten(1)
    return values[:, :rows].t().contiguous()


def _parts(bits: int) -> list[int]:
    return [width for width in PARTS if bits & width]
