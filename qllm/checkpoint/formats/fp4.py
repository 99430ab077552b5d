"""FP4 as integers: twice a number of E2M1 is one, so that a layer holds it as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.tensors import TensorReader, chunks, shortest
from qllm.gguf.blocks import e2m1_levels
from qllm.gguf.types import MXFP4
from qllm.ops.cpu.linear import LEVEL_BITS
from qllm.quant.packing import PackedWeight, pack, packed_size

BITS = 5


@dataclass(frozen=True)
class FP4(Format):
    """A module of FP4, whatever a tool calls its tensors: a reader puts them together so.

    codes   uint8 (N, K / 2), E2M1, the earlier one in the lower half of a byte
    scales  float32 (N, G)
    """

    name = "fp4"
    tensors = ("codes", "scales")
    channels = dict.fromkeys(tensors, (0, False))

    @property
    def held_bits(self) -> int:
        return LEVEL_BITS

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        read = TensorReader(tensors, self.spec, in_features, out_features)
        codes = read.tensor("codes", (out_features, in_features // 2), (torch.uint8,))
        scales = read.scales("scales", (out_features, read.groups))
        if read.group_size == MXFP4.group:  # of powers of two, for which there is a kernel
            return MXFP4.to_packed(_blocks(codes, scales))
        levels, byte = e2m1_levels(), torch.arange(256)
        # As one integer per byte, which torch takes from a table faster than two.
        pairs = (
            torch.stack((levels[byte & 15], levels[byte >> 4]), dim=1).view(torch.int16).view(-1)
        )
        packed = torch.empty(out_features, packed_size(in_features, BITS), dtype=torch.uint8)
        for part in chunks(out_features, in_features):
            values = pairs.index_select(0, codes[part].flatten().int()).view(torch.uint8)
            packed[part] = pack(values.view(-1, in_features), BITS)
        return PackedWeight(packed, shortest(scales / 2), codes.new_empty(0))


def _blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes of 32 inputs to a scale, which is a power of two, as a GGUF file has them.

    The first half of a block is in the lower halves of its bytes, the second in the upper ones.
    """
    first, second = codes.view(len(codes), -1, 2, 8).unbind(2)
    even = first & 15 | second << 4
    odd = first >> 4 | second & 240
    exponents = (scales.frexp().exponent + 126).byte()
    values = torch.stack((even, odd), dim=3).flatten(2)
    return torch.cat((exponents[..., None], values), dim=2).flatten(1)
