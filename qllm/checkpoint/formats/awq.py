"""AutoAWQ's checkpoints, version "gemm"; QLLM reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test, has_any
from qllm.checkpoint.formats.tensors import TensorReader, chunks, view_as, without_middle
from qllm.config import DEFAULT_GROUP_SIZE, LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import VALUES_PER_BLOCK, PackedWeight, pack, packed_size

BITS = 4
# In AWQ's words the columns 0 … 7 of the matrix lie in this order, from the lowest bits up.
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AWQ(Format):
    """An AWQ module: 4 bits, eight output channels to a word.

    qweight  int32 (K, N / 8)
    qzeros   int32 (G, N / 8)
    scales   (G, N)
    """

    name = "awq"
    tensors = ("qweight", "qzeros", "scales")
    channels = {"qweight": (1, True), "qzeros": (1, True), "scales": (1, False)}  # noqa: RUF012

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        if out_features % len(COLUMNS):
            raise UserError(
                f"qweight cannot hold {out_features} output channels: AWQ packs them by "
                f"{len(COLUMNS)}"
            )
        read = TensorReader(tensors, self.spec, in_features, out_features)
        width = out_features // len(COLUMNS)
        qweight = read.tensor("qweight", (in_features, width), (torch.int32,))
        qzeros = read.tensor("qzeros", (read.groups, width), (torch.int32,))
        scales = read.scales("scales", (read.groups, out_features)).t()
        packed = torch.empty(out_features, packed_size(in_features, BITS), dtype=torch.uint8)
        for part in chunks(in_features, out_features, VALUES_PER_BLOCK):
            values = _values(qweight[part]).t()
            start = packed_size(part.start, BITS)
            piece = pack(values, BITS)
            packed[:, start : start + piece.shape[1]] = piece
        zeros = _values(qzeros).t()
        return PackedWeight(packed, scales.contiguous(), without_middle(zeros, BITS))


def _values(words: Tensor) -> Tensor:
    """int32 (R, N / 8) to uint8 (R, N)."""
    values = words.new_empty(*words.shape, len(COLUMNS), dtype=torch.uint8)
    pairs = view_as(words, torch.uint8).view(*words.shape, -1)
    for i, column in enumerate(COLUMNS):
        values[..., column] = (pairs[..., i // 2] >> (BITS * (i % 2))) & 0xF
    return values.flatten(1)


def parse(fields: Fields) -> QuantizationConfig:
    """https://github.com/casper-hansen/AutoAWQ: a module is left out by a part of its name."""
    version = fields.text("version", "format", default="gemm").lower()
    fields.one_of("version", version, ("gemm",))
    if fields.get("backend") == "llm-awq":
        raise fields.error('backend "llm-awq"', "QLLM reads what AutoAWQ wrote")
    fields.one_of("bits", fields.number("bits", "w_bit"), (4,))
    # Without zero points the files have those of a symmetric grid: GPTQModel's and AutoRound's do.
    scheme = "asym" if fields.flag("zero_point", True) else "sym"
    group_size = fields.group_size("group_size", "q_group_size", default=DEFAULT_GROUP_SIZE)
    rules: list[tuple[Test, None]] = [(has_any(fields.texts("modules_to_not_convert")), None)]
    if not fields.flag("lm_head", False):
        rules.append((LM_HEAD.__eq__, None))
    return QuantizationConfig(tuple(rules), AWQ(QuantSpec(4, group_size, scheme, "weight_only")))
