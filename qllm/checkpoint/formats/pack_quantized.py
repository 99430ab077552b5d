"""compressed-tensors' `pack-quantized`: weights of 1 to 8 bits, several to a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format, Quantized
from qllm.checkpoint.formats.tensors import (
    INDEX_TYPES,
    TensorReader,
    by_channel,
    from_words,
    in_order,
    to_words,
    without_middle,
)
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight, pack, unpack


@dataclass(frozen=True)
class PackQuantized(Format):
    """A `pack-quantized` module.

    The values are signed there, and stored plus 2^(b-1): as ours are. Older versions left bits of
    a word unused where b does not divide 32; this is the dense packing that took their place.

        weight_packed      int32 (N, ceil(K b / 32)); a row is a stream of b-bit values
        weight_scale       (N, G), in the type they have
        weight_shape       int64 (2,): N, K
        weight_zero_point  int32 (ceil(N b / 32), G), if asymmetric; a column is a stream
        weight_g_idx       int32 (K,), the group of each channel, only where groups are not runs
    """

    name = "pack-quantized"
    tensors = ("weight_packed", "weight_scale", "weight_shape")
    optional = ("weight_zero_point", "weight_g_idx")
    channels = {  # noqa: RUF012
        "weight_packed": (0, False),
        "weight_scale": (0, False),
        "weight_zero_point": (0, True),
    }

    @staticmethod
    def holds(spec: QuantSpec) -> bool:
        return spec.kind == "weight_only"

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        bits = self.spec.bits
        read = TensorReader(tensors, self.spec, in_features, out_features)
        shape = read.tensor("weight_shape", (2,), INDEX_TYPES).tolist()
        if shape != [out_features, in_features]:
            raise UserError(f"weight_shape is {shape}, expected {[out_features, in_features]}")
        packed = read.stream("weight_packed", in_features, (out_features, None))
        scales = read.scales("weight_scale", (out_features, read.groups))
        zeros = scales.new_empty(0, dtype=torch.uint8)
        if "weight_zero_point" in tensors:
            words = read.stream("weight_zero_point", out_features, (None, read.groups)).t()
            zeros = unpack(from_words(words, bits, out_features), bits, out_features).t()
            zeros = without_middle(zeros, bits)
        perm = read.perm("weight_g_idx")
        packed = in_order(from_words(packed, bits, in_features), bits, in_features, perm)
        return PackedWeight(packed, scales.contiguous(), zeros, perm)

    def write(self, weight: Quantized, in_features: int) -> dict[str, Tensor]:
        assert isinstance(weight, PackedWeight)  # which is what the spec stands for
        bits = self.spec.bits
        qweight, g_idx = by_channel(weight, self.spec, in_features)
        tensors = {
            "weight_packed": to_words(qweight, bits, in_features),
            "weight_scale": weight.scales,
            "weight_shape": torch.tensor([len(qweight), in_features]),
        }
        if weight.qzeros.numel():
            zeros = to_words(pack(weight.qzeros.t(), bits), bits, len(qweight))
            tensors["weight_zero_point"] = zeros.t().contiguous()
        if weight.perm is not None:
            tensors["weight_g_idx"] = g_idx
        return tensors
