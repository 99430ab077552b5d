"""GGUF's blocks; QLLM reads them (`qllm.checkpoint.gguf`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test
from qllm.checkpoint.formats.tensors import TensorReader
from qllm.checkpoint.tensors import is_finite
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.gguf.types import PACKED
from qllm.quant.packing import PackedWeight, packed_size


@dataclass(frozen=True)
class GGUFBlocks(Format):
    """A module of a GGUF file.

    blocks  uint8 (N, bytes of a row)

    Attributes:
        type_name: of the blocks, "Q4_0" for one.
    """

    name = "gguf"
    tensors = ("blocks",)
    channels = {"blocks": (0, False)}  # noqa: RUF012

    type_name: str = "Q4_0"

    @property
    def held_bits(self) -> int:
        return PACKED[self.type_name].held_bits

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        kind = PACKED[self.type_name]
        if in_features % kind.values:
            raise UserError(
                f"blocks of {kind.values} values cannot hold {in_features} input channels"
            )
        read = TensorReader(tensors, self.spec, in_features, out_features)
        shape = (out_features, kind.row_bytes(in_features))
        packed = kind.to_packed(read.tensor("blocks", shape, (torch.uint8,)))
        for numbers in packed[1:3]:
            if numbers.is_floating_point() and not is_finite(numbers):
                raise UserError("blocks hold NaN or infinite scales; get the file again")
        return packed


@dataclass(frozen=True)
class GGUFMixed(Format):
    """A module of a GGUF file whose parts have several types, as `MixedType` puts them together.

    qweight  uint8 (N, packed_size(K, b))
    scales   float32 (N, G)
    offsets  float32 (N, G), of a scheme with offsets
    """

    name = "gguf-mixed"
    tensors = ("qweight", "scales")
    optional = ("offsets",)
    channels = dict.fromkeys((*tensors, *optional), (0, False))

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        read = TensorReader(tensors, self.spec, in_features, out_features)
        shape = (out_features, packed_size(in_features, self.spec.bits))
        q = read.tensor("qweight", shape, (torch.uint8,))
        grid = (out_features, read.groups)
        scales = read.scales("scales", grid)
        offsets = scales.new_empty(0, dtype=torch.uint8)
        if self.spec.scheme == "offset":
            offsets = read.scales("offsets", grid)
        return PackedWeight(q, scales, offsets)


def parse(fields: Fields) -> QuantizationConfig:
    """What `checkpoint.gguf` makes of a file: our names of modules, to types of blocks."""
    names: dict[str, set[str]] = {}
    modules = Fields(fields.get("modules"), f"{fields.where}.modules")
    for module in modules.value:
        type_name = modules.text(module)
        modules.one_of("type", type_name, tuple(PACKED))
        names.setdefault(type_name, set()).add(module)
    rules: list[tuple[Test, Format]] = []
    for module, settings in fields.objects("mixed").items():
        scheme = "offset" if settings.flag("offset", False) else "sym"
        bits, group = settings.number("bits"), settings.number("group")
        spec = QuantSpec(bits, group, scheme, "weight_only")
        rules.append((module.__eq__, GGUFMixed(spec)))
    for name, same in names.items():
        kind = PACKED[name]
        spec = QuantSpec(kind.bits, kind.group, kind.scheme, "weight_only")
        rules.append((same.__contains__, GGUFBlocks(spec, name)))
    return QuantizationConfig(tuple(rules), None)
