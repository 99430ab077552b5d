"""The tensors of quantized layers in files: taken with checks, and to rows of packed bits and back.

A matrix has N output channels, and K input channels in G = ceil(K / g) groups of g; b is its bits.
Tensors have the names that a file gives them, less the module's. Files are not to be trusted: a
reader checks every tensor before it uses it. Its `UserError` begins with the tensor's name, so
that the caller can put the module's name and a dot in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.checkpoint.tensors import is_finite
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import (
    VALUES_PER_BLOCK,
    PackedWeight,
    group_width,
    pack,
    packed_size,
    unpack,
)

WORD = 32
SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_TYPES = (torch.int32, torch.int64)

# Where values have to be unpacked, this many at a time: the temporaries stay small.
CHUNK_VALUES = 1 << 21


class TensorReader:
    """The tensors of one layer, checked as they are taken."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        spec: QuantSpec,
        in_features: int,
        out_features: int,
    ) -> None:
        self.tensors = tensors
        self.bits = spec.bits
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_width(in_features, spec.group_size)
        self.groups = -(-in_features // self.group_size)

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """The tensor of this name, shape and one of these types."""
        found = self._get(name)
        if found.shape != shape or found.dtype not in dtypes:
            raise UserError(f"{name} is {_describe(found)}, expected {_expected(shape, dtypes)}")
        return found

    def scales(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Scales as we hold them: bfloat16 ones as float16 where that is exact, else float32."""
        scales = self.tensor(name, shape, SCALE_TYPES)
        if not is_finite(scales):
            raise UserError(f"{name} holds NaN or infinite values")
        return shortest(scales.float()) if scales.dtype == torch.bfloat16 else scales

    def stream(self, name: str, count: int, shape: tuple[int | None, int | None]) -> Tensor:
        """int32 words that hold `count` values along the dimension that `shape` leaves open.

        They may end with the last value's word, or with its block of 32 values.
        """
        found = self._get(name)
        min_words = -(-count * self.bits // WORD)
        max_words = packed_size(count, self.bits) * 8 // WORD
        for words in (min_words, max_words):
            if found.shape == tuple(words if size is None else size for size in shape):
                break
        else:
            words = min_words
        return self.tensor(
            name, tuple(words if size is None else size for size in shape), (torch.int32,)
        )

    def signed(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """int8 that fit in the number of bits."""
        values = self.tensor(name, shape, (torch.int8,))
        low, high = (int(value) for value in values.aminmax())
        limit = 2 ** (self.bits - 1)
        if low < -limit or high >= limit:
            raise UserError(
                f"{name} holds values from {low} to {high}; {self.bits} bits hold "
                f"{-limit} to {limit - 1}"
            )
        return values

    def perm(self, name: str) -> Tensor | None:
        """The input channels sorted by group, from the group of each; None where that changes none.

        A g_idx of -1 throughout is one that compressed-tensors made and never set.
        """
        if name not in self.tensors:
            return None
        groups = self.tensor(name, (self.in_features,), INDEX_TYPES).long()
        runs = torch.arange(self.in_features) // self.group_size
        if torch.equal(groups, runs) or (groups == -1).all():
            return None
        low, high = (int(value) for value in groups.aminmax())
        if low < 0 or high >= self.groups:
            raise UserError(
                f"{name} holds groups from {low} to {high}; the layer has {self.groups}"
            )
        perm = groups.argsort(stable=True)
        if not torch.equal(groups[perm], runs):
            raise UserError(f"{name} has groups of other sizes than {self.group_size}")
        return perm

    def _get(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise UserError(f"{name} is missing")
        return self.tensors[name]


def _describe(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {tuple(tensor.shape)}"


def _expected(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> str:
    return f"{' or '.join(map(_name, dtypes))} {shape}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shortest(numbers: Tensor) -> Tensor:
    """float32 numbers as float16 where that is exact."""
    half = numbers.half()
    return half if torch.equal(half.float(), numbers) else numbers


def with_offsets(packed: Tensor, scales: Tensor, offsets: Tensor) -> PackedWeight:
    """Rows of integers with scales (N, G) and float32 offsets: both float16 where that is exact."""
    half = shortest(offsets)
    if scales.dtype != half.dtype:
        scales, half = scales.float(), offsets
    return PackedWeight(packed, scales.contiguous(), half.contiguous())


def to_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """Packed rows as int32, as many as hold `count` values: (R, ceil(count b / 32))."""
    words = view_as(packed, torch.int32)
    return words[:, : -(-count * bits // WORD)].contiguous()


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `to_words`; what lies behind the last value becomes 0."""
    missing = packed_size(count, bits) * 8 // WORD - words.shape[1]
    words = pad(words, (0, missing)) if missing else words
    packed = view_as(words, torch.uint8)
    rest = count % VALUES_PER_BLOCK
    if rest:
        start = packed.shape[1] - packed_size(rest, bits)
        last = pack(unpack(packed[:, start:], bits, rest), bits)
        packed = torch.cat([packed[:, :start], last], dim=1)
    return packed


def view_as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of rows as numbers of another type."""
    # Flat in between: a single row counts as contiguous with any stride, and then has no such view.
    return rows.contiguous().flatten().view(dtype).view(len(rows), -1)


def all_zeros(weight: PackedWeight, bits: int) -> Tensor:
    """The zero points (N, G), those of a symmetric grid too."""
    if weight.qzeros.numel():
        return weight.qzeros
    return torch.full_like(weight.scales, 2 ** (bits - 1), dtype=torch.uint8)


def without_middle(zeros: Tensor, bits: int) -> Tensor:
    """Zero points (N, G) as we hold them: none where all are those of a symmetric grid."""
    return zeros.new_empty(0) if (zeros == 2 ** (bits - 1)).all() else zeros.contiguous()


def by_channel(weight: PackedWeight, spec: QuantSpec, in_features: int) -> tuple[Tensor, Tensor]:
    """Packed rows with the input channels in their own order, and int32 (K,) the group of each."""
    group = group_width(in_features, spec.group_size)
    groups = torch.arange(in_features, dtype=torch.int32) // group
    if weight.perm is None:
        return weight.qweight, groups
    inverse_perm = weight.perm.argsort()
    return in_order(weight.qweight, spec.bits, in_features, inverse_perm), groups[inverse_perm]


def in_order(packed: Tensor, bits: int, count: int, perm: Tensor | None) -> Tensor:
    """Packed rows whose value i is value perm[i] of the given ones."""
    if perm is None:
        return packed
    out = torch.empty_like(packed)
    for part in chunks(len(packed), count):
        out[part] = pack(unpack(packed[part], bits, count)[:, perm], bits)
    return out


def chunks(rows: int, columns: int, step: int = 1) -> Iterator[slice]:
    """Slices of rows, multiples of `step` long, of about CHUNK_VALUES values each."""
    size = max(1, CHUNK_VALUES // (columns * step)) * step
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
