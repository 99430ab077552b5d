"""Packed matrices as the tensors of other tools' checkpoints, and back.

    gptq            GPTQ, AutoGPTQ, GPTQModel; zero points as they are (v2) or less 1 (v1)
    awq             AutoAWQ's "gemm": 4 bits
    pack-quantized  compressed-tensors: 1 to 8 bits
    int-quantized   compressed-tensors: one int8 per weight

A matrix has N output channels, and K input channels in G = ceil(K / g) groups of g; b is its bits.
Tensors have the names that a file gives them, less the module's. Files are not to be trusted: a
reader checks every tensor before it uses it. Its `UserError` begins with the tensor's name, so
that the caller can put the module's name and a dot in front of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

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

# In AWQ's words the columns 0 … 7 of the matrix lie in this order, from the lowest bits up.
AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# Where values have to be unpacked, this many at a time: the temporaries stay small.
CHUNK_VALUES = 1 << 21


class Int8Weight(NamedTuple):
    """A matrix (N, K) as int8 with one scale per output channel, for int8 activations.

    Attributes:
        qweight: int8 (N, K).
        scales: float16 or float32 (N,).
        input_scale: float32 (), the activations' scale; None where they get one per token.
    """

    qweight: Tensor
    scales: Tensor
    input_scale: Tensor | None = None


def to_gptq(
    weight: PackedWeight, bits: int, group_size: int, in_features: int
) -> dict[str, Tensor]:
    """The tensors of a GPTQ layer, as `checkpoint_format: gptq_v2` has them.

    A column of qweight is a little-endian stream of b-bit values, which is what our rows are; the
    words behind the last value are left out.

    Returns:
        qweight: int32 (ceil(K b / 32), N).
        qzeros: int32 (G, ceil(N b / 32)), a row being such a stream too.
        scales: (G, N), in the type they have.
        g_idx: int32 (K,), the group of each input channel.
    """
    qweight, g_idx = _by_channel(weight, bits, group_size, in_features)
    return {
        "qweight": _words(qweight, bits, in_features).t().contiguous(),
        "qzeros": _words(pack(_zeros(weight, bits).t(), bits), bits, len(qweight)),
        "scales": weight.scales.t().contiguous(),
        "g_idx": g_idx,
    }


def from_gptq(
    tensors: Mapping[str, Tensor],
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    *,
    v1: bool,
) -> PackedWeight:
    """The inverse of `to_gptq`.

    Args:
        tensors: as `to_gptq` returns them. g_idx may be missing, where groups are runs of input
            channels; the words of qweight and qzeros may be filled up to whole blocks of 32 values.
        v1: the zero points are stored less 1, as the original GPTQ does.

    Raises:
        UserError: for tensors of other shapes or types, or a g_idx whose groups are not all of
            group_size (the last one may be smaller).
    """
    read = _Reader(tensors, bits, group_size, in_features, out_features)
    qweight = read.stream("qweight", in_features, (None, out_features))
    zeros = read.stream("qzeros", out_features, (read.groups, None))
    if v1:
        zeros = _add_one(zeros, bits)
    zeros = unpack(_rows(zeros, bits, out_features), bits, out_features).t()
    scales = read.scales("scales", (read.groups, out_features)).t()
    order = read.order("g_idx")
    packed = _in_order(_rows(qweight.t(), bits, in_features), bits, in_features, order)
    return PackedWeight(packed, scales.contiguous(), _without_middle(zeros, bits), order)


def _add_one(words: Tensor, bits: int) -> Tensor:
    """Each b-bit value in rows of words plus 1.

    Values that divide a word are added to word by word, so that 2^b - 1 carries into the next one:
    GPTQModel writes v1 by subtracting from words, and only so does it come back where a zero point
    is 0. Others wrap.
    """
    if WORD % bits == 0:
        ones = sum(1 << shift for shift in range(0, WORD, bits))
        return words + (ones - (1 << WORD) if ones >> (WORD - 1) else ones)
    count = words.shape[1] * WORD // bits
    values = unpack(_rows(words, bits, count), bits, count)
    return _words(pack((values + 1) & (2**bits - 1), bits), bits, count)


def from_awq(
    tensors: Mapping[str, Tensor], group_size: int, in_features: int, out_features: int
) -> PackedWeight:
    """A layer of AutoAWQ's "gemm" version: 4 bits, eight output channels to a word.

    Args:
        tensors: qweight int32 (K, N / 8), qzeros int32 (G, N / 8) and scales (G, N).

    Raises:
        UserError: for tensors of other shapes or types.
    """
    if out_features % len(AWQ_ORDER):
        raise UserError(
            f"qweight cannot hold {out_features} output channels: AWQ packs them by "
            f"{len(AWQ_ORDER)}"
        )
    read = _Reader(tensors, AWQ_BITS, group_size, in_features, out_features)
    width = out_features // len(AWQ_ORDER)
    qweight = read.tensor("qweight", (in_features, width), (torch.int32,))
    qzeros = read.tensor("qzeros", (read.groups, width), (torch.int32,))
    scales = read.scales("scales", (read.groups, out_features)).t()
    packed = torch.empty(out_features, packed_size(in_features, AWQ_BITS), dtype=torch.uint8)
    for part in _chunks(in_features, out_features, VALUES_PER_BLOCK):
        values = _awq_values(qweight[part]).t()
        start = packed_size(part.start, AWQ_BITS)
        piece = pack(values, AWQ_BITS)
        packed[:, start : start + piece.shape[1]] = piece
    zeros = _awq_values(qzeros).t()
    return PackedWeight(packed, scales.contiguous(), _without_middle(zeros, AWQ_BITS))


def _awq_values(words: Tensor) -> Tensor:
    """int32 (R, N / 8) to uint8 (R, N)."""
    values = words.new_empty(*words.shape, len(AWQ_ORDER), dtype=torch.uint8)
    pairs = _view(words, torch.uint8).view(*words.shape, -1)
    for i, column in enumerate(AWQ_ORDER):
        values[..., column] = (pairs[..., i // 2] >> (AWQ_BITS * (i % 2))) & 0xF
    return values.flatten(1)


def to_pack_quantized(
    weight: PackedWeight, bits: int, group_size: int, in_features: int
) -> dict[str, Tensor]:
    """The tensors of a compressed-tensors `pack-quantized` layer.

    The values are signed there, and stored plus 2^(b-1): as ours are. Older versions left bits of
    a word unused where b does not divide 32; this is the dense packing that took their place.

    Returns:
        weight_packed: int32 (N, ceil(K b / 32)); a row is a little-endian stream of b-bit values.
        weight_scale: (N, G), in the type they have.
        weight_shape: int64 (2,): N, K.
        weight_zero_point: int32 (ceil(N b / 32), G), only of an asymmetric grid; a column is a
            stream.
        weight_g_idx: int32 (K,), the group of each channel, only where groups are not runs.
    """
    qweight, g_idx = _by_channel(weight, bits, group_size, in_features)
    tensors = {
        "weight_packed": _words(qweight, bits, in_features),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor([len(qweight), in_features]),
    }
    if weight.qzeros.numel():
        zeros = _words(pack(weight.qzeros.t(), bits), bits, len(qweight))
        tensors["weight_zero_point"] = zeros.t().contiguous()
    if weight.order is not None:
        tensors["weight_g_idx"] = g_idx
    return tensors


def from_pack_quantized(
    tensors: Mapping[str, Tensor],
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> PackedWeight:
    """The inverse of `to_pack_quantized`.

    Raises:
        UserError: for tensors of other shapes or types, or another weight_shape.
    """
    read = _Reader(tensors, bits, group_size, in_features, out_features)
    shape = read.tensor("weight_shape", (2,), INDEX_TYPES).tolist()
    if shape != [out_features, in_features]:
        raise UserError(f"weight_shape is {shape}, expected {[out_features, in_features]}")
    packed = read.stream("weight_packed", in_features, (out_features, None))
    scales = read.scales("weight_scale", (out_features, read.groups))
    zeros = scales.new_empty(0, dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        words = read.stream("weight_zero_point", out_features, (None, read.groups)).t()
        zeros = unpack(_rows(words, bits, out_features), bits, out_features).t()
        zeros = _without_middle(zeros, bits)
    order = read.order("weight_g_idx")
    packed = _in_order(_rows(packed, bits, in_features), bits, in_features, order)
    return PackedWeight(packed, scales.contiguous(), zeros, order)


def to_int_quantized(weight: Int8Weight) -> dict[str, Tensor]:
    """The tensors of a compressed-tensors `int-quantized` layer with int8 activations.

    Returns:
        weight: int8 (N, K).
        weight_scale: (N, 1), in the type they have.
        input_scale: float32 (1,), only where the activations have one scale.
    """
    tensors = {"weight": weight.qweight, "weight_scale": weight.scales[:, None]}
    if weight.input_scale is not None:
        tensors["input_scale"] = weight.input_scale.reshape(1)
    return tensors


def from_int_quantized(
    tensors: Mapping[str, Tensor], in_features: int, out_features: int, *, static: bool
) -> Int8Weight:
    """The inverse of `to_int_quantized`; one weight_scale for all of the matrix is read too.

    Args:
        static: the activations have one scale, which the file holds.

    Raises:
        UserError: for tensors of other shapes or types, zero points that are not 0, or an
            input_scale that is not above 0.
    """
    read = _Reader(tensors, 8, -1, in_features, out_features)
    qweight = read.tensor("weight", (out_features, in_features), (torch.int8,))
    for name in ("weight_zero_point", "input_zero_point"):
        if name in tensors and tensors[name].count_nonzero():
            raise UserError(f"{name} is not 0; with int8 activations QLLM reads symmetric grids")
    if "weight_scale" in tensors and tensors["weight_scale"].numel() == 1:
        scales = read.scales("weight_scale", tuple(tensors["weight_scale"].shape))
        scales = scales.reshape(1).repeat(out_features)
    else:
        scales = read.scales("weight_scale", (out_features, 1))[:, 0]
    input_scale = None
    if static:
        shape = (1,) if "input_scale" not in tensors or tensors["input_scale"].dim() else ()
        input_scale = read.scales("input_scale", shape).float().reshape(())
        if input_scale <= 0:
            raise UserError(f"input_scale is {input_scale.item()}, expected a number above 0")
    return Int8Weight(qweight, scales.contiguous(), input_scale)


def from_int_quantized_weight(
    tensors: Mapping[str, Tensor],
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> PackedWeight:
    """An `int-quantized` layer whose activations are not quantized, as packed integers.

    Args:
        tensors: weight int8 (N, K), weight_scale (N, G), weight_zero_point int8 (N, G) of an
            asymmetric grid; values and zero points are signed and of b bits.

    Raises:
        UserError: for tensors of other shapes or types, or values of more bits.
    """
    read = _Reader(tensors, bits, group_size, in_features, out_features)
    values = read.signed("weight", (out_features, in_features))
    scales = read.scales("weight_scale", (out_features, read.groups))
    zeros = scales.new_empty(0, dtype=torch.uint8)
    if "weight_zero_point" in tensors:
        zeros = read.signed("weight_zero_point", (out_features, read.groups))
        zeros = _without_middle(_unsigned(zeros, bits), bits)
    packed = torch.empty(out_features, packed_size(in_features, bits), dtype=torch.uint8)
    for part in _chunks(out_features, in_features):
        packed[part] = pack(_unsigned(values[part], bits), bits)
    return PackedWeight(packed, scales.contiguous(), zeros)


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """int8 of b bits to uint8: plus 2^(b-1), modulo 256."""
    return values.view(torch.uint8) + 2 ** (bits - 1)


class _Reader:
    """The tensors of one layer, checked as they are taken."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        bits: int,
        group_size: int,
        in_features: int,
        out_features: int,
    ) -> None:
        self.tensors = tensors
        self.bits = bits
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_width(in_features, group_size)
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
        if not scales.isfinite().all():
            raise UserError(f"{name} holds NaN or infinite values")
        if scales.dtype == torch.bfloat16:
            half = scales.half()
            return half if torch.equal(half.float(), scales.float()) else scales.float()
        return scales

    def stream(self, name: str, count: int, shape: tuple[int | None, int | None]) -> Tensor:
        """int32 words that hold `count` values along the dimension that `shape` leaves open.

        They may end with the last value's word, or with its block of 32 values.
        """
        found = self._get(name)
        least = -(-count * self.bits // WORD)
        most = packed_size(count, self.bits) * 8 // WORD
        for words in (least, most):
            if found.shape == tuple(words if size is None else size for size in shape):
                break
        else:
            words = least
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

    def order(self, name: str) -> Tensor | None:
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
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], runs):
            raise UserError(f"{name} has groups of other sizes than {self.group_size}")
        return order

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


def _words(packed: Tensor, bits: int, count: int) -> Tensor:
    """Packed rows as int32, as many as hold `count` values: (R, ceil(count b / 32))."""
    words = _view(packed, torch.int32)
    return words[:, : -(-count * bits // WORD)].contiguous()


def _rows(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `_words`; what lies behind the last value becomes 0."""
    missing = packed_size(count, bits) * 8 // WORD - words.shape[1]
    words = pad(words, (0, missing)) if missing else words
    packed = _view(words, torch.uint8)
    rest = count % VALUES_PER_BLOCK
    if rest:
        start = packed.shape[1] - packed_size(rest, bits)
        last = pack(unpack(packed[:, start:], bits, rest), bits)
        packed = torch.cat([packed[:, :start], last], dim=1)
    return packed


def _view(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of rows as numbers of another type."""
    # Flat in between: a single row counts as contiguous with any stride, and then has no such view.
    return rows.contiguous().flatten().view(dtype).view(len(rows), -1)


def _zeros(weight: PackedWeight, bits: int) -> Tensor:
    """The zero points (N, G), those of a symmetric grid too."""
    if weight.qzeros.numel():
        return weight.qzeros
    return torch.full_like(weight.scales, 2 ** (bits - 1), dtype=torch.uint8)


def _without_middle(zeros: Tensor, bits: int) -> Tensor:
    """Zero points (N, G) as we hold them: none where all are those of a symmetric grid."""
    return zeros.new_empty(0) if (zeros == 2 ** (bits - 1)).all() else zeros.contiguous()


def _by_channel(
    weight: PackedWeight, bits: int, group_size: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """Packed rows with the input channels in their own order, and int32 (K,) the group of each."""
    group = group_width(in_features, group_size)
    groups = torch.arange(in_features, dtype=torch.int32) // group
    if weight.order is None:
        return weight.qweight, groups
    place = weight.order.argsort()
    return _in_order(weight.qweight, bits, in_features, place), groups[place]


def _in_order(packed: Tensor, bits: int, count: int, order: Tensor | None) -> Tensor:
    """Packed rows whose value i is value order[i] of the given ones."""
    if order is None:
        return packed
    out = torch.empty_like(packed)
    for part in _chunks(len(packed), count):
        out[part] = pack(unpack(packed[part], bits, count)[:, order], bits)
    return out


def _chunks(rows: int, columns: int, step: int = 1) -> Iterator[slice]:
    """Slices of rows, multiples of `step` long, of about CHUNK_VALUES values each."""
    size = max(1, CHUNK_VALUES // (columns * step)) * step
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
