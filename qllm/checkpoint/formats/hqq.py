"""HQQ's checkpoints, as transformers 4 saves them; QLLM reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test, has_any
from qllm.checkpoint.formats.tensors import TensorReader, chunks, with_offsets
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight, pack, packed_size

# By their bits, how many values a number of W_q has, the first in its highest bits.
VALUES = {1: 8, 2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}
# Settings of a module that change what its tensors are, of which QLLM reads those that are off.
FLAGS = ("view_as_float", "quant_scale", "quant_zero")
# Its other settings: of how it was quantized, and of types.
OTHERS = (
    *("packing", "unpack_view_dtype", "compute_dtype", "channel_wise", "optimize", "round_zero"),
    *("offload_meta", "encoded_state_dict", "stores_quant_config"),
)
# Parts of linears' names that settings leave out, as they do numbers.
LEFT_OUT = ("model", "layers")


@dataclass(frozen=True)
class HQQ(Format):
    """A module whose groups are rows of the matrix (N G, g), of integers and floats.

    W_q    (N G / v, g), v values to a number: row r holds rows r, r + N G / v, …; of 3 bits int32,
           the last of whose values may stand for nothing, of all others uint8
    scale  (N G, 1)
    zero   (N G, 1), which need not be a whole number: a weight is (q - zero) · scale

    The others are the module's settings, each a tensor: nbits, group_size, axis, shape, …
    """

    name = "hqq"
    tensors = ("W_q", "scale", "zero")
    optional = ("nbits", "group_size", "axis", "shape", *FLAGS, *OTHERS)
    channels = {}  # noqa: RUF012

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        read, bits = TensorReader(tensors, self.spec, in_features, out_features), self.spec.bits
        if self.spec.group_size != -1 and in_features % self.spec.group_size:
            raise UserError(
                f"W_q has groups of {self.spec.group_size}, some of which would be of two of its "
                f"rows of {in_features} input channels; QLLM reads groups that divide them"
            )
        width, rows = read.group_size, out_features * read.groups
        expected = {"nbits": bits, "group_size": width, "axis": 1, **dict.fromkeys(FLAGS, 0)}
        for name, value in expected.items():
            _check(tensors, name, [value])
        _check(tensors, "shape", [out_features, in_features])
        step = -(-rows // VALUES[bits])
        numbers = read.tensor("W_q", (step, width), (torch.int32 if bits == 3 else torch.uint8,))
        scales, zeros = (
            read.scales(name, (rows, 1)).view(out_features, -1) for name in ("scale", "zero")
        )
        packed = torch.empty(out_features, packed_size(in_features, bits), dtype=torch.uint8)
        for part in chunks(out_features, in_features):
            row = torch.arange(part.start * read.groups, part.stop * read.groups)
            shifts = (VALUES[bits] - 1 - row // step) * bits
            values = numbers[row % step] >> shifts[:, None].to(numbers.dtype)
            if VALUES[bits] > 1:
                values &= 2**bits - 1
            elif int(values.max()) >> bits:
                raise UserError(f"W_q holds {int(values.max())}, which {bits} bits do not")
            packed[part] = pack(values.to(torch.uint8).view(-1, in_features), bits)
        return with_offsets(packed, scales, -zeros.float() * scales.float())

    def slices(self, shapes: Mapping[str, Sequence[int]], out_features: int, run: range) -> None:
        """None: a run of rows lies in as many numbers as several such runs."""


def _check(tensors: Mapping[str, Tensor], name: str, expected: list[int]) -> None:
    """Refuse a module's own setting that is another than config.json's, where it is there."""
    found = tensors.get(name)
    if found is not None and (found.numel() > 2 or found.flatten().tolist() != expected):
        raise UserError(f"{name} is {found.flatten()[:3].tolist()}, expected {expected}")


def parse(fields: Fields) -> QuantizationConfig:
    """transformers' HqqConfig: settings of all linears, or of those of a kind by its name."""
    rules: list[tuple[Test, HQQ | None]] = [(has_any(fields.texts("skip_modules")), None)]
    settings = Fields(fields.get("quant_config"), f"{fields.where}.quant_config")
    if "weight_quant_params" in settings.value:
        return QuantizationConfig(tuple(rules), _module(settings))
    kinds = {kind: _module(each) for kind, each in fields.objects("quant_config").items()}
    rules += [(partial(_is_of_kind, kind), module) for kind, module in kinds.items()]
    return QuantizationConfig(tuple(rules), None)


def _is_of_kind(kind: str, name: str) -> bool:
    """Whether HQQ calls linears such as "model.layers.3.mlp.up_proj" so: "mlp.up_proj"."""
    parts = (part for part in name.split(".") if part not in LEFT_OUT and not part.isnumeric())
    return f".{'.'.join(parts)}".endswith(f".{kind}")


def _module(settings: Fields) -> HQQ:
    weights = Fields(settings.get("weight_quant_params"), f"{settings.where}.weight_quant_params")
    bits = weights.number("nbits")
    weights.one_of("nbits", bits, tuple(VALUES))
    weights.one_of("axis", weights.number("axis"), (1,))
    weights.one_of("channel_wise", weights.flag("channel_wise", True), (True,))
    weights.unset("view_as_float")
    group_size = weights.group_size("group_size", default=-1)
    return HQQ(QuantSpec(bits, group_size, "offset", "weight_only"))
