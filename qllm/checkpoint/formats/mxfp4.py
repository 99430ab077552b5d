"""MXFP4 as gpt-oss has it, and transformers reads it; QLLM reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig
from qllm.checkpoint.formats.tensors import TensorReader, chunks, shortest
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.gguf.blocks import e2m1_levels
from qllm.ops.cpu.linear import LEVEL_BITS
from qllm.quant.packing import PackedWeight, pack, packed_size

# Twice a number of E2M1 is an integer of 5 bits, and a scale half of what the file has.
BITS, GROUP = 5, 32
# Of an exponent: of 1, halved; and the byte that stands for no number.
HALVED_BIAS, NAN = 128, 255


@dataclass(frozen=True)
class MXFP4(Format):
    """A module of small floats, E2M1, of which each 32 share a power of two (OCP MX 1.0).

    blocks  uint8 (N, K / 2), the earlier value in the lower half of a byte
    scales  uint8 (N, K / 32), exponents plus 127
    """

    name = "mxfp4"
    tensors = ("blocks", "scales")
    channels = dict.fromkeys(tensors, (0, False))

    @property
    def held_bits(self) -> int:
        return LEVEL_BITS

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        read = TensorReader(tensors, self.spec, in_features, out_features)
        shape = (out_features, in_features // 2)
        if in_features % GROUP:
            raise UserError(f"blocks of {GROUP} values cannot hold {in_features} input channels")
        codes = read.tensor("blocks", shape, (torch.uint8,))
        exponents = read.tensor("scales", (out_features, read.groups), (torch.uint8,))
        if (exponents == NAN).any():
            raise UserError("scales hold NaN; get the file again")
        levels = e2m1_levels()
        byte = torch.arange(256)
        pairs = torch.stack((levels[byte & 15], levels[byte >> 4]), dim=1)
        packed = torch.empty(out_features, packed_size(in_features, BITS), dtype=torch.uint8)
        for part in chunks(out_features, in_features):
            values = pairs.index_select(0, codes[part].flatten().int())
            packed[part] = pack(values.view(-1, in_features), BITS)
        scales = torch.ones(exponents.shape).ldexp(exponents.int() - HALVED_BIAS)
        return PackedWeight(packed, shortest(scales), codes.new_empty(0))


def parse(fields: Fields) -> QuantizationConfig:
    """transformers' Mxfp4Config; what it leaves out is at 16 bits in the file."""
    return QuantizationConfig((), MXFP4(QuantSpec(BITS, GROUP, "sym", "weight_only")))
