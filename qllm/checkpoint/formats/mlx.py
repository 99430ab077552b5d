"""MLX's checkpoints, and those of transformers' Metal kernels; QLLM reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.floats import find_mlx_floats
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test, has_any
from qllm.checkpoint.formats.tensors import WORD, TensorReader, from_words
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight

BITS = (2, 3, 4, 5, 6, 8)
FLOAT_MODES = ("mxfp4", "nvfp4", "mxfp8")
# MLX's where settings leave them out.
DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, 64


@dataclass(frozen=True)
class MLX(Format):
    """A module of MLX's `affine` mode: a weight is q · scale + bias, embeddings' as well.

    weight  uint32 (N, K b / 32), rows being little-endian streams of b-bit values, as ours are
    scales  (N, G)
    biases  (N, G)
    """

    name = "mlx"
    tensors = ("weight", "scales", "biases")
    channels = dict.fromkeys(tensors, (0, False))

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        bits = self.spec.bits
        if in_features * bits % WORD:
            raise UserError(f"weight cannot hold {in_features} input channels of {bits} bits")
        read = TensorReader(tensors, self.spec, in_features, out_features)
        shape = (out_features, in_features * bits // WORD)
        words = read.tensor("weight", shape, (torch.uint32,))
        scales, offsets = (
            read.scales(name, (out_features, read.groups)) for name in self.tensors[1:]
        )
        if scales.dtype != offsets.dtype:
            scales, offsets = scales.float(), offsets.float()
        packed = from_words(words.view(torch.int32), bits, in_features)
        return PackedWeight(packed, scales.contiguous(), offsets.contiguous())


class Metal(MLX):
    """The same by other names, of linears alone."""

    name = "metal"
    tensors = ("weight", "scales", "qbiases")
    channels = dict.fromkeys(tensors, (0, False))


def parse(fields: Fields) -> QuantizationConfig:
    """https://github.com/ml-explore/mlx-lm: modules that differ have an entry by their name.

    It is an object of settings, or false: at 16 bits.
    """
    rules: list[tuple[Test, Format | None]] = []
    for key, value in fields.few("it", fields.value).items():
        if value is False:
            rules.append((key.__eq__, None))
        elif isinstance(value, dict):
            rules.append((key.__eq__, _module(Fields(value, f"{fields.where}.{key}"))))
    return QuantizationConfig(tuple(rules), _module(fields), find_mlx_floats)


def _module(fields: Fields) -> MLX | None:
    """How a module is stored; None as small floats."""
    mode = fields.text("mode", default="affine")
    fields.one_of("mode", mode, ("affine", *FLOAT_MODES))
    return MLX(_spec(fields)) if mode == "affine" else None


def parse_metal(fields: Fields) -> QuantizationConfig:
    """transformers' MetalConfig."""
    fields.one_of("mode", fields.text("mode", default="affine"), ("affine",))
    skipped = has_any(fields.texts("modules_to_not_convert"))
    return QuantizationConfig(((skipped, None),), Metal(_spec(fields)))


def _spec(fields: Fields) -> QuantSpec:
    bits = fields.number("bits", default=DEFAULT_BITS)
    fields.one_of("bits", bits, BITS)
    group_size = fields.group_size("group_size", default=DEFAULT_GROUP_SIZE)
    return QuantSpec(bits, group_size, "offset", "weight_only")
