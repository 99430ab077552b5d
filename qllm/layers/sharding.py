"""Shards of a matrix: which channels each rank has, and how they are taken out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qllm.quant.packing import PackedWeight, group_width, pack, packed_size, unpack

# Values unpacked at a time: the temporaries stay small beside a matrix.
CHUNK_VALUES = 1 << 21
UNITS = (128, 64, 32)  # channels that are better left together: groups and the kernels' panels


@dataclass(frozen=True)
class Sharding:
    """How ranks share one matrix.

    Attributes:
        dim: 0: its output channels, 1: its input channels.
        ranges: of each rank, its runs of channels.
    """

    dim: int
    ranges: tuple[tuple[range, ...], ...]

    @classmethod
    def evenly(cls, dim: int, size: int, world: int) -> Self:
        """`size` channels that may be cut anywhere, shared as evenly as whole UNITS allow.

        Raises:
            ValueError: there are fewer channels than ranks.
        """
        unit = next((unit for unit in UNITS if size % (unit * world) == 0), UNITS[-1])
        unit = unit if -(-size // unit) >= world else 1
        return cls(dim, tuple((run,) for run in split_evenly(size, world, unit)))

    @property
    def widths(self) -> list[int]:
        """How many channels each rank has."""
        return [sum(map(len, runs)) for runs in self.ranges]


def split_evenly(size: int, world: int, unit: int = 1) -> list[range]:
    """`size` channels in `world` runs of whole units, whose lengths differ by a unit at most.

    The first runs are the longer ones; the last unit may be a shorter one.

    Raises:
        ValueError: there are fewer units than runs.
    """
    units = -(-size // unit)
    if not 1 <= world <= units:
        raise ValueError(f"{size} channels in units of {unit} cannot be shared by {world} ranks")
    each, more = divmod(units, world)
    ends = [min(size, unit * (each * (i + 1) + min(i + 1, more))) for i in range(world)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def narrow_runs(tensor: Tensor, dim: int, ranges: Sequence[range]) -> Tensor:
    """Some runs of a tensor along `dim`, in memory of their own."""
    size = list(tensor.shape)
    size[dim], start = sum(map(len, ranges)), 0
    out = tensor.new_empty(size)  # torch.cat of meta tensors would import torch's compiler
    for run in ranges:
        out.narrow(dim, start, len(run)).copy_(tensor.narrow(dim, run.start, len(run)))
        start += len(run)
    return out


def narrow_columns(
    weight: PackedWeight, bits: int, group_size: int, in_features: int, columns: range
) -> tuple[PackedWeight, int]:
    """Some input channels of a packed matrix, and the group size that they then have.

    Where the run begins inside a group, groups become the longest ones that both its beginning and
    the old groups' ends are multiples of: each has the scale and zero of the group it was cut from.
    """
    group = group_width(in_features, group_size)
    size = math.gcd(group, columns.start % group) or group
    if columns.start // group == (columns.stop - 1) // group:
        size = len(columns)  # all of it is of one group
    starts = range(columns.start, columns.stop, size)
    index = torch.tensor([start // group for start in starts], device=weight.scales.device)
    packed = weight.qweight.new_empty(len(weight.qweight), packed_size(len(columns), bits))
    step = max(1, CHUNK_VALUES // in_features)
    for start in range(0, 0 if packed.is_meta else len(packed), step):
        rows = slice(start, start + step)
        values = unpack(weight.qweight[rows], bits, in_features)
        packed[rows] = pack(values[:, columns.start : columns.stop], bits)
    # index_select of meta tensors would ask for operators that qllm.deferred leaves.
    zeros = weight.qzeros[:, index].contiguous() if weight.qzeros.numel() else weight.qzeros
    scales = weight.scales[:, index].contiguous()
    return PackedWeight(packed, scales, zeros), -1 if len(index) == 1 else size
