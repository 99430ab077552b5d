"""BitNet's checkpoints, whose weights are -1, 0 and 1; QLLM reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig
from qllm.checkpoint.formats.tensors import TensorReader, chunks, shortest
from qllm.checkpoint.tensors import is_finite
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight, pack, packed_size

BITS = 2
# Rows in a byte, the first in its lowest bits.
ROWS = 4
# Classes of linears in transformers, both of which also make activations int8; ours stay as they
# are. Of the second, "online" ones have floats that each step rounds.
LINEAR, AUTO = "bitlinear", "autobitlinear"


@dataclass(frozen=True)
class BitNet(Format):
    """A module of -1, 0 and 1, which are stored as 0, 1 and 2.

    weight        uint8 (N / 4, K), of which row r holds rows r, r + N / 4, r + N / 2, r + 3 N / 4
    weight_scale  (1,)

    Attributes:
        inverse: a weight is its integer divided by the scale, rather than times it.
    """

    name = "bitnet"
    tensors = ("weight", "weight_scale")
    channels = {}  # noqa: RUF012

    inverse: bool = True

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        if out_features % ROWS:
            raise UserError(
                f"weight cannot hold {out_features} output channels: BitNet packs them by {ROWS}"
            )
        read = TensorReader(tensors, self.spec, in_features, out_features)
        shape = (out_features // ROWS, in_features)
        rows = read.tensor("weight", shape, (torch.uint8,))
        packed = torch.empty((ROWS, shape[0], packed_size(in_features, BITS)), dtype=torch.uint8)
        for part in chunks(*shape):
            for i in range(ROWS):
                values = (rows[part] >> BITS * i) & 3
                if (values == 3).any():
                    raise UserError("weight holds a 3, expected 0, 1 and 2 for -1, 0 and 1")
                packed[i, part] = pack(values + 1, BITS)
        scales = self._scale(read).repeat(out_features, 1)
        return PackedWeight(packed.flatten(0, 1), scales, rows.new_empty(0))

    def _scale(self, read: TensorReader) -> Tensor:
        """What all integers are multiplied by."""
        scale = read.scales("weight_scale", (1,))
        if not self.inverse:
            return scale
        inverse = scale.float().reciprocal()
        if not is_finite(inverse):
            raise UserError(f"weight_scale is {scale.item()}, which nothing can be divided by")
        return shortest(inverse)

    def slices(self, shapes: Mapping[str, Sequence[int]], out_features: int, run: range) -> None:
        """None: a run of rows lies in as many bytes as four such runs."""


def parse(fields: Fields) -> QuantizationConfig:
    """transformers' BitNetQuantConfig; what it leaves out is at 16 bits in the file."""
    linear_class = fields.text("linear_class", default=LINEAR)
    fields.one_of("linear_class", linear_class, (LINEAR, AUTO))
    if linear_class == AUTO:
        mode = fields.text("quantization_mode", default="offline")
        fields.one_of("quantization_mode", mode, ("offline",))
    fields.unset("use_rms_norm")
    spec = QuantSpec(BITS, -1, "sym", "weight_only")
    return QuantizationConfig((), BitNet(spec, linear_class == LINEAR))
