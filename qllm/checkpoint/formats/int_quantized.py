"""compressed-tensors' `int-quantized`: one int8 per weight, and int8 activations in most cases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format, Int8Weight, Quantized
from qllm.checkpoint.formats.tensors import TensorReader, chunks, without_middle
from qllm.config import W8A8, QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight, pack, packed_size


@dataclass(frozen=True)
class IntQuantized(Format):
    """An `int-quantized` module.

    With int8 activations, which is how QLLM writes it:

        weight        int8 (N, K)
        weight_scale  (N, 1), in the type they have; in a file one for all of the matrix, too
        input_scale   float32 (1,), only where the activations have one scale

    Where activations are not quantized, values and zero points are signed and of b bits:

        weight             int8 (N, K)
        weight_scale       (N, G)
        weight_zero_point  int8 (N, G), only of an asymmetric grid
    """

    name = "int-quantized"
    tensors = ("weight", "weight_scale")
    optional: ClassVar[tuple[str, ...]] = ("weight_zero_point", "input_scale", "input_zero_point")
    channels = {  # noqa: RUF012
        "weight": (0, False),
        "weight_scale": (0, False),
        "weight_zero_point": (0, False),
    }

    @staticmethod
    def holds(spec: QuantSpec) -> bool:
        return spec.kind in W8A8.values()

    def read(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Quantized:
        """See `Format.read`.

        Zero points that are not 0 beside int8 activations, and an input_scale that is not above 0,
        are refused too.
        """
        read = TensorReader(tensors, self.spec, in_features, out_features)
        if self.spec.kind == "weight_only":
            return self._read_packed(read)
        weight, weight_scale = self.tensors
        qweight = read.tensor(weight, (out_features, in_features), (torch.int8,))
        for name in (name for name in self.optional if name.endswith("zero_point")):
            if name in tensors and tensors[name].count_nonzero():
                raise UserError(
                    f"{name} is not 0; with int8 activations QLLM reads symmetric grids"
                )
        if weight_scale in tensors and tensors[weight_scale].numel() == 1:
            scales = read.scales(weight_scale, tuple(tensors[weight_scale].shape))
            scales = scales.reshape(1).repeat(out_features)
        else:
            scales = read.scales(weight_scale, (out_features, 1))[:, 0]
        input_scale = None
        if self.spec.kind == "w8a8_static":
            shape = (1,) if "input_scale" not in tensors or tensors["input_scale"].dim() else ()
            input_scale = read.scales("input_scale", shape).float().reshape(())
            if input_scale <= 0:
                raise UserError(f"input_scale is {input_scale.item()}, expected a number above 0")
        return Int8Weight(qweight, scales.contiguous(), input_scale)

    def _read_packed(self, read: TensorReader) -> PackedWeight:
        """A module whose activations are not quantized, as packed integers."""
        bits, shape = self.spec.bits, (read.out_features, read.in_features)
        weight, weight_scale = self.tensors
        values = read.signed(weight, shape)
        scales = read.scales(weight_scale, (read.out_features, read.groups))
        zeros = scales.new_empty(0, dtype=torch.uint8)
        zero_point = self.optional[0]
        if zero_point in read.tensors:
            zeros = read.signed(zero_point, (read.out_features, read.groups))
            zeros = without_middle(_unsigned(zeros, bits), bits)
        packed = torch.empty(
            read.out_features, packed_size(read.in_features, bits), dtype=torch.uint8
        )
        for part in chunks(*shape):
            packed[part] = pack(_unsigned(values[part], bits), bits)
        return PackedWeight(packed, scales.contiguous(), zeros)

    def write(self, weight: Quantized, in_features: int) -> dict[str, Tensor]:
        assert isinstance(weight, Int8Weight)  # which is what the spec stands for
        tensors = {"weight": weight.qweight, "weight_scale": weight.scales[:, None]}
        if weight.input_scale is not None:
            tensors["input_scale"] = weight.input_scale.reshape(1)
        return tensors


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """int8 of b bits to uint8: plus 2^(b-1), modulo 256."""
    return values.view(torch.uint8) + 2 ** (bits - 1)
