"""torchao's checkpoints, as transformers 5 saves them in safetensors; QLLM reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.checkpoint.formats.base import Format, Quantized
from qllm.checkpoint.formats.floats import find_floats
from qllm.checkpoint.formats.int_quantized import IntQuantized
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test, short
from qllm.checkpoint.formats.tensors import TensorReader, with_offsets
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight, packed_size

# torchao's settings of one kind of linear, or of several by their names.
INT8, INTX, INT4 = "Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Int4WeightOnlyConfig"
DYNAMIC = "Int8DynamicActivationInt8WeightConfig"
FLOATS = ("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig")
BY_NAME = ("FqnToConfig", "ModuleFqnToConfig")
# Of all; what the first wrote were pickles.
VERSION = 2
DEFAULT = "_default"
PER_ROW, PER_TENSOR, PER_GROUP, PER_AXIS = "PerRow", "PerTensor", "PerGroup", "PerAxis"


@dataclass(frozen=True)
class TorchAO(IntQuantized):
    """A module of one signed integer of b bits per weight, with int8 activations or without.

    _weight_qdata       int8 (N, K)
    _weight_scale       (N, G), or (1, 1): of all of the matrix
    _weight_zero_point  int8, of the scales' shape
    """

    name = "torchao"
    tensors = ("_weight_qdata", "_weight_scale")
    optional = ("_weight_zero_point",)
    channels = dict.fromkeys((*tensors, *optional), (0, False))

    @staticmethod
    def holds(spec: QuantSpec) -> bool:
        return False

    def read(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Quantized:
        found = dict(tensors)
        if self.spec.group_size == -1:
            for name in (self.tensors[1], *self.optional):
                if name in found and found[name].shape == (1, 1):
                    found[name] = found[name].expand(out_features, 1)
        return super().read(found, in_features, out_features)


@dataclass(frozen=True)
class TorchAOInt4(Format):
    """A module of `Int4Tensor`, whose weights are q · scale + zero_point, with q from -8 to 7.

    _weight_qdata       int8 or uint8 (N, K / 2), the first value of two in the low bits
    _weight_scale       (G, N)
    _weight_zero_point  (G, N)
    """

    name = "torchao-int4"
    tensors = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
    channels = {  # noqa: RUF012
        "_weight_qdata": (0, False),
        "_weight_scale": (1, False),
        "_weight_zero_point": (1, False),
    }

    def read(
        self, tensors: Mapping[str, Tensor], in_features: int, out_features: int
    ) -> PackedWeight:
        if in_features % 2:
            raise UserError(f"_weight_qdata cannot hold {in_features} input channels by two")
        read = TensorReader(tensors, self.spec, in_features, out_features)
        shape = (out_features, in_features // 2)
        signed = read.tensor(self.tensors[0], shape, (torch.int8, torch.uint8))
        scales, zeros = (
            read.scales(name, (read.groups, out_features)).t() for name in self.tensors[1:]
        )
        # Plus 8, modulo 16.
        packed = pad(signed.view(torch.uint8) ^ 0x88, (0, packed_size(in_features, 4) - shape[1]))
        return with_offsets(packed, scales, zeros.float() - 8 * scales.float())


def parse(fields: Fields) -> QuantizationConfig:
    """transformers' TorchAoConfig; what it leaves out is at 16 bits in the file."""
    types = Fields(fields.get("quant_type"), f"{fields.where}.quant_type")
    settings = Fields(types.get("default"), f"{types.where}.default")
    if settings.text("_type") not in BY_NAME:
        return QuantizationConfig((), _module(settings), find_floats)
    return _by_name(Fields(settings.get("_data"), f"{settings.where}._data"))


def _by_name(fields: Fields) -> QuantizationConfig:
    """Settings by the names of modules, or of their weights: names, then patterns, then others."""
    key = "fqn_to_config" if fields.get("fqn_to_config") else "module_fqn_to_config"
    modules = Fields(fields.get(key), f"{fields.where}.{key}")
    found: dict[str, Format | None] = {}
    for name, value in fields.few(key, modules.value).items():
        settings = f"{modules.where}[{short(name)}]"
        found[name] = None if value is None else _module(Fields(value, settings))
    default = found.pop(DEFAULT, None)
    patterns = {name: found.pop(name) for name in [*found] if name.startswith("re:")}
    # config.json is sorted; what a file says is stored decides all but this.
    kinds = {format.spec.kind for format in patterns.values() if format is not None}
    if len(kinds) > 1:
        raise fields.error(
            f"patterns with and without int8 activations in {key}",
            "QLLM reads those of one kind, for config.json has lost their order",
        )
    rules: list[tuple[Test, Format | None]] = [
        (partial(_is_named, name), format) for name, format in found.items()
    ]
    for name, format in patterns.items():
        whole = fields.pattern(rf"(?:{name.removeprefix('re:')})\Z")
        rules.append((partial(_is_matched, whole), format))
    return QuantizationConfig(tuple(rules), default, find_floats)


def _is_named(key: str, name: str) -> bool:
    return key in (name, f"{name}.weight")


def _is_matched(whole: Test, name: str) -> bool:
    return whole(f"{name}.weight") or whole(name)


def _module(settings: Fields) -> Format | None:
    """How a module is stored; None as small floats."""
    kind = settings.text("_type")
    settings.one_of("_type", kind, (INT8, INTX, INT4, DYNAMIC, *FLOATS))
    settings.one_of("_version", settings.number("_version", default=1), (VERSION,))
    if kind in FLOATS:
        return None
    data = Fields(settings.get("_data"), f"{settings.where}._data")
    if kind == DYNAMIC:
        return _dynamic(data)
    if kind == INT4:
        packing = _name_of(data, "int4_packing_format", "plain")
        data.one_of("int4_packing_format", packing, ("plain",))
        group_size = data.group_size("group_size", default=128)
        return TorchAOInt4(QuantSpec(4, group_size, "offset", "weight_only"))
    bits = 8
    granularity = Fields(data.get("granularity"), f"{data.where}.granularity")
    choices: tuple[str, ...] = (PER_ROW, PER_TENSOR, PER_GROUP)
    if kind == INTX:
        packing = _name_of(data, "intx_packing_format", "unpacked_to_int8")
        data.one_of("intx_packing_format", packing, ("unpacked_to_int8",))
        types = tuple(f"int{bits}" for bits in range(1, 9))
        dtype = _name_of(data, "weight_dtype", "int8")
        data.one_of("weight_dtype", dtype, types)
        bits, choices = types.index(dtype) + 1, (PER_AXIS, PER_GROUP)
    group_size = _group_size(granularity, choices)
    return TorchAO(QuantSpec(bits, group_size, "asym", "weight_only"))


def _dynamic(data: Fields) -> TorchAO:
    """int8 weights of a scale per channel or matrix, and int8 activations of one per token."""
    data.unset("reduce_range", "weight_only_decode")
    mapping = _name_of(data, "act_mapping_type", "symmetric")
    data.one_of("act_mapping_type", mapping, ("symmetric",))
    given = data.get("granularity")
    given = given if isinstance(given, list) else [given, given]
    if len(given) != 2:
        raise data.error(f"{len(given)} of granularity", "expected one, or two")
    inputs, weights = (
        Fields({"_type": PER_ROW} if value is None else value, f"{data.where}.granularity")
        for value in given
    )
    _group_size(inputs, (PER_ROW,))
    _group_size(weights, (PER_ROW, PER_TENSOR))
    return TorchAO(QuantSpec(8, -1, "sym", "w8a8_dynamic"))


def _group_size(granularity: Fields, choices: tuple[str, ...]) -> int:
    """What shares a scale; -1 is a channel, or all channels."""
    kind = granularity.text("_type")
    granularity.one_of("_type", kind, choices)
    data = Fields(granularity.get("_data") or {}, f"{granularity.where}._data")
    if kind == PER_GROUP:
        return data.group_size("group_size")
    if kind == PER_ROW:
        data.one_of("dim", data.number("dim", default=-1), (-1, 1))
    if kind == PER_AXIS:
        data.one_of("axis", data.number("axis", default=0), (0,))
    return -1


def _name_of(data: Fields, key: str, default: str) -> str:
    """A member of an enumeration, or a type: its name, or an object that has it."""
    value = data.get(key)
    if isinstance(value, dict):
        data = Fields({key: value.get("_data")}, data.where)
    return data.text(key, default=default).lower()
