"""GGUF's blocks in groups of 32; QLLM reads them (`qllm.checkpoint.gguf`)."""

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
from qllm.quant.packing import PackedWeight


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


def parse(fields: Fields) -> QuantizationConfig:
    """What `checkpoint.gguf` makes of a file: our names of modules, to types of blocks."""
    names: dict[str, set[str]] = {}
    modules = Fields(fields.get("modules"), f"{fields.where}.modules")
    for module in modules.value:
        type_name = modules.text(module)
        modules.one_of("type", type_name, tuple(PACKED))
        names.setdefault(type_name, set()).add(module)
    rules: list[tuple[Test, GGUFBlocks]] = []
    for name, same in names.items():
        kind = PACKED[name]
        spec = QuantSpec(kind.bits, kind.group, kind.scheme, "weight_only")
        rules.append((same.__contains__, GGUFBlocks(spec, name)))
    return QuantizationConfig(tuple(rules), None)
