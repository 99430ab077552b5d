"""Weight-only quantization: packed integers, one scale and zero point per group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm import ops
from qllm.config import QuantSpec
from qllm.layers.base import ALL_ROWS, QuantizedLinear
from qllm.layers.sharding import narrow_columns, narrow_runs
from qllm.ops.reference import dequantize, packed_embedding
from qllm.quant.packing import PackedWeight, group_width, pack, packed_size, unpack
from qllm.quant.rtn import quantize_rtn

# Kernels lay input channels out so many at once.
CHANNELS_AT_ONCE = 32


class WeightOnlyLinear(QuantizedLinear):
    """A weight of 1 to 8 bits, group-wise; activations stay as they are, unless told otherwise.

    Buffers until a kernel takes them, for N output and K input channels, b bits, G groups:

        qweight  uint8  (N, ceil(K / 32) · 4b)   a row is one little-endian stream of b-bit values
        scales   float16 (float32 where that over- or underflows)  (N, G)
        qzeros   uint8  (N, G), empty for the symmetric scheme, where each is 2^(b-1); of the
                 scheme "offset" numbers in the type of the scales, added to q · scale
        bias     (N,) or None
    """

    op = "weight_only_linear"
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor

    def __init__(
        self,
        qweight: Tensor,
        scales: Tensor,
        qzeros: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        in_features: int,
    ) -> None:
        super().__init__(in_features, qweight.shape[0], spec)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("bias", bias)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, spec: QuantSpec, dtype: torch.dtype
    ) -> WeightOnlyLinear:
        qweight = torch.empty(
            out_features, packed_size(in_features, spec.bits), dtype=torch.uint8, device="meta"
        )
        groups = (out_features, spec.groups(in_features))
        scales = qweight.new_empty(groups, dtype=torch.float16)
        offset = spec.scheme == "offset"
        qzeros = (scales if offset else qweight).new_empty(0 if spec.scheme == "sym" else groups)
        offsets = qweight.new_empty(out_features, dtype=dtype) if bias else None
        return cls(qweight, scales, qzeros, offsets, spec, in_features)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        *,
        input_range: float | None = None,
        all_fit: Callable[[bool], bool] = bool,
    ) -> WeightOnlyLinear:
        packed = quantize_rtn(weight, spec.bits, spec.group_size, spec.scheme, all_fit=all_fit)
        return cls.from_packed(packed, bias, spec, weight.shape[1])

    @staticmethod
    def from_packed(
        packed: PackedWeight, bias: Tensor | None, spec: QuantSpec, in_features: int
    ) -> WeightOnlyLinear:
        """The layer of integers that were chosen before, by any algorithm."""
        qweight, scales, qzeros, perm = packed
        if perm is None:
            return WeightOnlyLinear(qweight, scales, qzeros, bias, spec, in_features)
        return ReorderedLinear(qweight, scales, qzeros, bias, spec, in_features, perm)

    def stored(self) -> dict[str, Tensor]:
        packed = self.packed
        return {"qweight": packed.qweight, "scales": packed.scales, "qzeros": packed.qzeros}

    def round_activations(self) -> None:
        """Multiply activations as int8 from now on, which is faster; before a kernel is chosen."""
        self.op = "weight_only_linear_int8"

    @property
    def tensors(self) -> PackedWeight:
        return PackedWeight(self.qweight, self.scales, self.qzeros)

    @tensors.setter
    def tensors(self, packed: PackedWeight) -> None:
        self.qweight, self.scales, self.qzeros, _ = packed

    def forward(self, x: Tensor) -> Tensor:
        return self.run(
            x,
            self.qweight,
            self.scales,
            self.qzeros,
            self.bias,
            self.out_features,
            self.spec.bits,
            self.spec.group_size,
        )

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        packed = self.packed
        return dequantize(
            packed.qweight[rows],
            packed.scales[rows],
            packed.qzeros[rows] if packed.qzeros.numel() else packed.qzeros,
            self.spec.bits,
            self.spec.group_size,
            self.in_features,
            torch.float32,
        )

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of the matrix, by their numbers, int64 (n,): (n, K) in dtype."""
        if self.layout:
            return self.layout.look_up(index, self.tensors, self.request, dtype)
        shape = (self.spec.bits, self.spec.group_size, self.in_features)
        return packed_embedding(index, self.tensors, *shape, dtype)

    def narrow(self, dim: int, *ranges: range) -> WeightOnlyLinear:
        layer = self._narrow(dim, *ranges)
        layer.op = self.op
        return layer

    def _narrow(self, dim: int, *ranges: range) -> WeightOnlyLinear:
        packed = self.packed
        if dim == 0:
            bias = None if self.bias is None else narrow_runs(self.bias, 0, ranges)
            qweight, scales, qzeros = (
                narrow_runs(t, 0, ranges) if t.numel() else t for t in packed[:3]
            )
            rows = PackedWeight(qweight, scales, qzeros, packed.perm)
            return WeightOnlyLinear.from_packed(rows, bias, self.spec, self.in_features)
        (columns,) = ranges
        spec = self.spec
        some, group = narrow_columns(packed, spec.bits, spec.group_size, self.in_features, columns)
        spec = replace(spec, group_size=group)
        return WeightOnlyLinear.from_packed(some, None, spec, len(columns))


class ReorderedLinear(WeightOnlyLinear):
    """A weight whose groups are not runs of input channels (GPTQ's act-order).

    Buffers: those of `WeightOnlyLinear`, whose columns stand for the channels in this order, and

        perm   int64 (K,)   packed column i holds input channel perm[i]
    """

    perm: Tensor

    def __init__(
        self,
        qweight: Tensor,
        scales: Tensor,
        qzeros: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        in_features: int,
        perm: Tensor,
    ) -> None:
        super().__init__(qweight, scales, qzeros, bias, spec, in_features)
        self.register_buffer("perm", perm)

    @property
    def packed(self) -> PackedWeight:
        return super().packed._replace(perm=self.perm)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(ops.on(x.device.type).gather(x, self.perm))

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        columns = super().dequantize(rows)
        return torch.empty_like(columns).index_copy_(1, self.perm, columns)

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        columns = super().look_up(index, dtype)
        return torch.empty_like(columns).index_copy_(1, self.perm, columns)

    def _narrow(self, dim: int, *ranges: range) -> WeightOnlyLinear:
        if dim == 0:
            return super()._narrow(dim, *ranges)
        (channels,) = ranges
        spec, packed = self.spec, self.packed
        group = group_width(self.in_features, spec.group_size)
        mine = (self.perm >= channels.start) & (self.perm < channels.stop)
        columns = mine.nonzero().flatten()
        counts = (columns // group).bincount(minlength=spec.groups(self.in_features))
        # Of each group a few channels are here: all groups are padded to the size of the one that
        # has most of them, with a column whose input is 0.
        width = -(-int(counts.max()) // CHANNELS_AT_ONCE) * CHANNELS_AT_ONCE
        slots = torch.arange(width, device=counts.device) < counts[:, None]  # (G, width)
        source = torch.zeros(slots.numel(), dtype=torch.int64, device=counts.device)
        perm = torch.full_like(source, len(channels))
        source[slots.flatten()] = columns
        perm[slots.flatten()] = self.perm[columns] - channels.start
        values = unpack(packed.qweight, spec.bits, self.in_features)[:, source]
        rows = PackedWeight(pack(values, spec.bits), *packed[1:3])
        spec = replace(spec, group_size=width if len(counts) > 1 else -1)
        return ScatteredLinear(*rows[:3], None, spec, len(perm), perm, channels=len(channels))


class ScatteredLinear(ReorderedLinear):
    """Some input channels of a `ReorderedLinear`: a few of each group.

    Buffers: as there, K being the columns that the groups fill; where `perm` is the number of
    channels, a column has none, and its input is 0.

    Attributes:
        channels: inputs that it takes.
    """

    def __init__(self, *args: Any, channels: int) -> None:
        super().__init__(*args)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad(x, (0, 1)))

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        columns = WeightOnlyLinear.dequantize(self, rows)
        filled = self.perm < self.channels
        out = columns.new_empty(len(columns), self.channels)
        return out.index_copy_(1, self.perm[filled], columns[:, filled])
