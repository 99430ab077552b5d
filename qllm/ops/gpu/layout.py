"""How the GPU kernels want a packed weight, and the way back; in torch ops, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.quant.packing import PackedWeight
from qllm.quant.packing import pack as pack_rows
from qllm.quant.packing import unpack as unpack_rows

PANEL = 64  # output channels that lie together
BLOCK, SMALLEST_BLOCK = 128, 32  # input channels that are multiplied at once, and have one scale
PARTS = (8, 4, 2, 1)  # widths of which every number of bits is a sum of different ones
CHUNK = 1 << 24  # values that are repacked at a time


class Shape(NamedTuple):
    """Of a weight in the kernels' layout.

    Attributes:
        group: inputs that share a scale.
        room: what they take up: a power of two from SMALLEST_BLOCK on, or whole BLOCKs.
        groups: of a row.
        block: inputs of a block.
        blocks: of a row.
        panels: of PANEL output channels each.
    """

    group: int
    room: int
    groups: int
    block: int
    blocks: int
    panels: int

    @classmethod
    def of(cls, in_features: int, out_features: int, group_size: int) -> Shape:
        group = in_features if group_size == -1 else min(group_size, in_features)
        if group >= BLOCK:
            room = -(-group // BLOCK) * BLOCK
        else:
            room = max(SMALLEST_BLOCK, 1 << (group - 1).bit_length())
        groups, block = -(-in_features // group), min(room, BLOCK)
        return cls(group, room, groups, block, groups * room // block, -(-out_features // PANEL))

    @property
    def spreads(self) -> bool:
        """Whether groups have gaps between them, which x then needs as well."""
        return self.groups > 1 and self.room != self.group

    def spread(self, x: Tensor) -> Tensor:
        """x (M, K) with each group at the beginning of its room, and zeros behind it."""
        x = pad(x, (0, self.groups * self.group - x.shape[1])).unflatten(1, (-1, self.group))
        return pad(x, (0, self.room - self.group)).flatten(1)


def pack(weight: PackedWeight, bits: int, group_size: int, in_features: int) -> PackedWeight:
    """A weight (N, K) in the kernels' layout.

    A block of a panel has its values part by part: a part holds p bits of each, p being 8, 4, 2
    or 1, the lower bits in the wider part. Of a row's BK values, word i of BK p / 32 holds in its
    bits [j p, (j + 1) p) the value 2 r for r = j BK p / 32 + i, and 16 bits further up 2 r + 1.

    Returns:
        qweight int32 (panels, blocks, PANEL BK bits / 32): of a part, the words of one row after
        the other's; scales (G, panels PANEL) and qzeros uint8 of that shape, or empty.
    """
    shape = Shape.of(in_features, len(weight.qweight), group_size)
    step = max(1, CHUNK // (shape.blocks * shape.block * PANEL)) * PANEL
    packed = [
        _words(unpack_rows(rows, bits, in_features), bits, shape)
        for rows in weight.qweight.split(step)
    ]
    columns = (0, shape.panels * PANEL - len(weight.qweight))
    scales, zeros = (
        pad(tensor.t(), columns).contiguous() if tensor.numel() else tensor
        for tensor in weight[1:3]
    )
    return PackedWeight(torch.cat(packed), scales, zeros)


def _words(values: Tensor, bits: int, shape: Shape) -> Tensor:
    """Rows of values, uint8 (R, K), as words (ceil(R / PANEL), blocks, PANEL BK bits / 32)."""
    values = pad(shape.spread(values), (0, 0, 0, -len(values) % PANEL))
    values = values.view(-1, PANEL, shape.blocks, shape.block).to(torch.int32)
    parts, low = [], 0
    for width in _parts(bits):
        count = shape.block * width // 32
        part = values.bitwise_right_shift(low).bitwise_and_((1 << width) - 1)
        part = part.unflatten(-1, (16 // width, count, 2))
        words = values.new_zeros(*values.shape[:3], count)
        for field in range(16 // width):
            for half in range(2):
                words |= part[..., field, :, half] << (16 * half + field * width)
        parts.append(words.transpose(1, 2).flatten(2))
        low += width
    return torch.cat(parts, dim=-1)


def unpack(
    packed: PackedWeight, bits: int, group_size: int, in_features: int, out_features: int
) -> PackedWeight:
    """The inverse of `pack`."""
    shape = Shape.of(in_features, out_features, group_size)
    step = max(1, CHUNK // (shape.blocks * shape.block * PANEL))
    rows = [
        pack_rows(_values(words, bits, shape)[:, :in_features], bits)
        for words in packed.qweight.split(step)
    ]
    scales, zeros = (
        tensor.t()[:out_features].contiguous() if tensor.numel() else tensor
        for tensor in packed[1:3]
    )
    return PackedWeight(torch.cat(rows)[:out_features], scales, zeros)


def _values(words: Tensor, bits: int, shape: Shape) -> Tensor:
    """The inverse of `_words`, with the rows that fill the last panel: uint8 (R, G · group)."""
    values = words.new_zeros(len(words), PANEL, shape.blocks, shape.block, dtype=torch.uint8)
    start = low = 0
    for width in _parts(bits):
        count = shape.block * width // 32
        part = words[..., start : start + PANEL * count]
        part = part.unflatten(-1, (PANEL, count)).transpose(1, 2)
        fields = values.unflatten(-1, (16 // width, count, 2))
        for field in range(16 // width):
            for half in range(2):
                value = (part >> (16 * half + field * width)) & ((1 << width) - 1)
                fields[..., field, :, half] |= (value << low).to(torch.uint8)
        start, low = start + PANEL * count, low + width
    values = values.view(-1, shape.groups, shape.room)
    return values[..., : shape.group].flatten(1)


def _parts(bits: int) -> list[int]:
    return [width for width in PARTS if bits & width]
