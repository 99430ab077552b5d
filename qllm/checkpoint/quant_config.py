"""The `quantization_config` of a config.json: which module is stored how.

Read are GPTQ (v1 and v2), AWQ and compressed-tensors; the tensors are those of
`qllm.checkpoint.formats`. Written is GPTQ v2 where that holds every module, which is weight-only
ones of 2, 3, 4 and 8 bits, and compressed-tensors otherwise: GPTQModel lays other widths out in
bit planes under the same name, and nobody's GPTQ knows int8 activations.

Modules have their Hugging Face names. A name decides alone: that a module is a linear layer at all,
and that the file has its tensors, is for the caller to know.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qllm import __version__
from qllm.config import DEFAULT_GROUP_SIZE, LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.patterns import Patterns

GPTQ_BITS = (2, 3, 4, 8)
WEIGHT_ONLY, DYNAMIC, STATIC = "weight_only", "w8a8_dynamic", "w8a8_static"

# vLLM joins these modules, and looks for a rule under the name of the joined one.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

Test = Callable[[str], bool]

# Entries of a list or an object of rules; the largest models have some thousand linears.
MOST_ENTRIES = 10_000
# Values of an option that is not used.
UNSET = (None, False, {}, [], "")


@dataclass(frozen=True)
class Storage:
    """How a quantized module is stored.

    Attributes:
        format: "gptq", "awq", "pack-quantized" or "int-quantized".
        spec: as the config has it. GPTQ's `sym` binds nobody: whether a grid is symmetric is seen
            in its zero points.
        v1: zero points are stored less 1 (GPTQ).
    """

    format: str
    spec: QuantSpec
    v1: bool = False


@dataclass(frozen=True)
class QuantizationConfig:
    """A `quantization_config`, read.

    Attributes:
        rules: pairs of a test of a module's name and what the modules that pass it are; the first
            one decides. None is a module at 16 bits.
        default: what the modules are that no rule names.
    """

    rules: tuple[tuple[Test, Storage | None], ...]
    default: Storage | None

    def find(self, module: str) -> Storage | None:
        """How a module, such as "model.layers.0.self_attn.q_proj", is stored; None at 16 bits.

        Raises:
            UserError: for a regular expression that takes too long.
        """
        for test, storage in self.rules:
            if test(module):
                return storage
        return self.default


def parse(value: object, where: str) -> QuantizationConfig:
    """Read a `quantization_config`.

    Args:
        value: the JSON object.
        where: the file it is from, for messages.

    Raises:
        UserError: for one that is not whole, or that QLLM cannot compute what it says.
    """
    if isinstance(value, dict) and isinstance(value.get("quantization_config"), dict):
        # Older compressed-tensors nested it so.
        value = {"quant_method": "compressed-tensors", **value["quantization_config"]}
    fields = _Fields(value, f"{where}: quantization_config")
    method = fields.text("quant_method")
    if method.lower() not in METHODS:
        found = f"quant_method {_short(method)}"
        raise fields.error(found, "QLLM reads gptq, awq and compressed-tensors")
    return METHODS[method.lower()](fields)


def describe(
    specs: Mapping[str, QuantSpec], *, desc_act: bool = False, compressed: bool = False
) -> dict[str, object]:
    """The `quantization_config` of a model, such that `parse` finds each module's spec in it.

    Args:
        specs: Hugging Face module name to spec, 16-bit ones included. At least one is quantized.
        desc_act: input channels are grouped by importance (their groups are in `g_idx`).
        compressed: compressed-tensors where GPTQ would hold every module, too.
    """
    specs = {name: _plain(spec) for name, spec in specs.items()}
    quantized = {name: spec for name, spec in specs.items() if spec.kind != "dense"}
    if not quantized:
        raise ValueError("every module is at 16 bits; there is no quantization to describe")
    gptq = all(s.kind == WEIGHT_ONLY and s.bits in GPTQ_BITS for s in quantized.values())
    if gptq and not compressed:
        return _describe_gptq(specs, quantized, desc_act)
    return _describe_compressed(specs, quantized, desc_act)


def _plain(spec: QuantSpec) -> QuantSpec:
    """What of a spec a checkpoint is told: not how the integers were chosen."""
    if spec.kind == "dense":
        return QuantSpec()
    return QuantSpec(spec.bits, spec.group_size, spec.scheme, spec.kind)


class _Fields:
    """A JSON object, each of whose values is checked as it is taken."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {_short(value)}, expected a JSON object")
        self.value: dict[str, Any] = value
        self.where = where
        self._patterns = Patterns(where)

    def error(self, found: str, reads: str) -> UserError:
        return UserError(f"{self.where} has {found}; {reads}")

    def get(self, *names: str) -> object:
        """The value of the first of these names that is there, None without one."""
        return next((self.value[name] for name in names if self.value.get(name) is not None), None)

    def text(self, *names: str, default: str | None = None) -> str:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(f"{names[0]} {_short(value)}", "expected a text")
        return value

    def number(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{names[0]} {_short(value)}", "expected a whole number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{name} {_short(value)}", "expected true or false")
        return value

    def group_size(self, *names: str, default: int | None = None) -> int:
        """A group size; a null is the whole channel where one may be left out."""
        if default is not None and any(name in self.value for name in names):
            default = -1
        value = self.number(*names, default=default)
        if value < 1 and value != -1:
            raise self.error(f"{names[0]} {value}", "expected 1 or more, or -1")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts; one of lists of texts is laid flat."""
        values = self.get(name)
        if values is None:
            return []
        if isinstance(values, list):
            flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
            if all(isinstance(v, str) for v in flat):
                return self._few(name, flat)
        raise self.error(f"{name} {_short(values)}", "expected a list of texts")

    def objects(self, name: str) -> dict[str, _Fields]:
        """An object of objects."""
        value = self.value.get(name)
        fields = _Fields({} if value in UNSET else value, f"{self.where}.{name}")
        self._few(name, fields.value)
        return {
            key: _Fields(v, f"{fields.where}[{_short(key)}]") for key, v in fields.value.items()
        }

    def _few(self, name: str, values: Any) -> Any:
        """The values, each of which is to be compared with every module's name."""
        if len(values) > MOST_ENTRIES:
            raise self.error(f"{len(values)} entries in {name}", f"QLLM reads up to {MOST_ENTRIES}")
        return values

    def one_of(self, name: str, value: object, choices: tuple[object, ...]) -> None:
        """Refuse a value that is none of those QLLM reads."""
        if value not in choices:
            listed = " or ".join(_short(choice) for choice in choices)
            raise self.error(f"{name} {_short(value)}", f"QLLM reads {listed}")

    def unset(self, *names: str) -> None:
        """Refuse what would change the result and QLLM does not do."""
        for name in names:
            if self.value.get(name) not in UNSET:
                found = f"{name} {_short(self.value[name])}"
                raise self.error(found, f"QLLM reads checkpoints without {name}")

    def pattern(self, regex: str) -> Test:
        """Whether a name begins with what a regular expression matches."""
        self._patterns.compile(regex)
        return lambda name: self._patterns.match(regex, name)


def _short(value: object) -> str:
    """A value from a file, on one line of bounded length."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# GPTQ


def _parse_gptq(fields: _Fields) -> QuantizationConfig:
    """https://github.com/ModelCloud/GPTQModel: `dynamic` is tried in order, "-:" rules first."""
    layout = fields.text("checkpoint_format", "format", default="gptq").lower()
    fields.one_of("checkpoint_format", layout, ("gptq", "gptq_v2"))
    fields.unset("is_marlin_format", "rotation", "activation")
    fields.one_of("pack_dtype", fields.text("pack_dtype", default="int32"), ("int32",))
    base = _gptq_spec(fields, None)
    v1 = layout == "gptq"
    skipped: list[tuple[Test, None]] = []
    rules: list[tuple[Test, Storage]] = []
    if not fields.flag("lm_head", False):
        skipped.append((LM_HEAD.__eq__, None))
    for key, override in fields.objects("dynamic").items():
        pattern = fields.pattern(key.removeprefix("-:").removeprefix("+:"))
        if key.startswith("-:"):
            skipped.append((pattern, None))
        else:
            override.unset("adapter", "format", "checkpoint_format", "pack_dtype")
            rules.append((pattern, Storage("gptq", _gptq_spec(override, base), v1)))
    # A list of the modules in each layer that are quantized; the others are not.
    names = fields.texts("modules_in_block_to_quantize")
    if names:
        ends = tuple(f".{name}" for name in names)
        skipped.append((lambda name: name != LM_HEAD and not f".{name}".endswith(ends), None))
    return QuantizationConfig((*skipped, *rules), Storage("gptq", base, v1))


def _gptq_spec(fields: _Fields, base: QuantSpec | None) -> QuantSpec:
    bits = fields.number("bits", default=base.bits if base else None)
    fields.one_of("bits", bits, GPTQ_BITS)
    default = base.group_size if base else DEFAULT_GROUP_SIZE
    group_size = fields.group_size("group_size", default=default)
    sym = fields.flag("sym", base.scheme == "sym" if base else True)
    return QuantSpec(bits, group_size, "sym" if sym else "asym", WEIGHT_ONLY)


def _describe_gptq(
    specs: Mapping[str, QuantSpec], quantized: Mapping[str, QuantSpec], desc_act: bool
) -> dict[str, object]:
    (base, _), *others = Counter(quantized.values()).most_common()
    dynamic: dict[str, dict[str, object]] = {}
    dense = [name for name in specs if name not in quantized and name != LM_HEAD]
    for regex in _alternatives(dense):
        dynamic[f"-:{regex}"] = {}
    for spec, _ in others:
        differing = {
            key: value
            for key, value in _gptq_fields(spec).items()
            if value != _gptq_fields(base)[key]
        }
        for regex in _alternatives(name for name in quantized if quantized[name] == spec):
            dynamic[f"+:{regex}"] = dict(differing)
    config: dict[str, object] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        **_gptq_fields(base),
        "desc_act": desc_act,
        "lm_head": LM_HEAD in quantized,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qllm:{__version__}"]},
    }
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _gptq_fields(spec: QuantSpec) -> dict[str, object]:
    return {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.scheme == "sym"}


def _alternatives(names: Iterable[str]) -> list[str]:
    """Regular expressions that match just these names, one for each set of layers.

    "model.layers.0.mlp.up_proj" and "model.layers.1.mlp.up_proj" become
    "^model\\.layers\\.(?:0|1)(?:\\.mlp\\.up_proj)$".
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for name in _with_fused(names):
        before, index, after = re.fullmatch(r"(.*?)(?:(?<=\.)(\d+)(?=\.)(.*))?", name).groups("")
        layers.setdefault((before, after), []).append(index)
    tails: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), indices in layers.items():
        tails.setdefault((before, tuple(indices)), []).append(after)
    return [
        f"^{re.escape(before)}{_either(indices)}{_either(after)}$"
        for (before, indices), after in tails.items()
    ]


def _either(parts: Iterable[str]) -> str:
    listed = "|".join(re.escape(part) for part in parts)
    return f"(?:{listed})" if listed else ""


def _with_fused(names: Iterable[str]) -> list[str]:
    """The names, and those that vLLM gives to modules joined from them."""
    known = dict.fromkeys(names)
    for name in list(known):
        parent, _, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            if last == parts[0] and all(f"{parent}.{part}" in known for part in parts):
                known[f"{parent}.{fused}"] = None
    return list(known)


# AWQ


def _parse_awq(fields: _Fields) -> QuantizationConfig:
    """https://github.com/casper-hansen/AutoAWQ: a module is left out by a part of its name."""
    version = fields.text("version", "format", default="gemm").lower()
    fields.one_of("version", version, ("gemm",))
    if fields.get("backend") == "llm-awq":
        raise fields.error('backend "llm-awq"', "QLLM reads what AutoAWQ wrote")
    fields.one_of("bits", fields.number("bits", "w_bit"), (4,))
    fields.one_of("zero_point", fields.flag("zero_point", True), (True,))
    group_size = fields.group_size("group_size", "q_group_size", default=DEFAULT_GROUP_SIZE)
    parts = fields.texts("modules_to_not_convert")
    rules: list[tuple[Test, None]] = [(lambda name: any(part in name for part in parts), None)]
    if not fields.flag("lm_head", False):
        rules.append((LM_HEAD.__eq__, None))
    return QuantizationConfig(
        tuple(rules), Storage("awq", QuantSpec(4, group_size, "asym", WEIGHT_ONLY))
    )


# compressed-tensors


def _parse_compressed(fields: _Fields) -> QuantizationConfig:
    """https://github.com/vllm-project/compressed-tensors: a name is stronger than a pattern, a
    pattern than the class of all linear layers; what is ignored is so before all of them."""
    fields.unset("kv_cache_scheme", "transform_config")
    sparsity = fields.get("sparsity_config")
    if sparsity is not None:
        sparse = _Fields(sparsity, f"{fields.where}.sparsity_config")
        sparse.one_of("format", sparse.text("format", default="dense"), ("dense",))
    ignored = fields.texts("ignore")
    rules: list[tuple[Test, Storage | None]] = [(frozenset(ignored).__contains__, None)]
    rules += [(_target(fields, target), None) for target in ignored if _is_general(target)]
    targets: dict[str, Storage] = {}
    for group in fields.objects("config_groups").values():
        storage = _compressed_storage(group, fields)
        targets.update(dict.fromkeys(group.texts("targets"), storage))
    if not targets:
        raise fields.error("no config_groups with targets", "it says of no module how it is stored")
    named: dict[Storage, set[str]] = {}
    for target, storage in targets.items():
        named.setdefault(storage, set()).add(target)
    rules += [(names.__contains__, storage) for storage, names in named.items()]
    general = sorted(filter(_is_general, targets), key=lambda target: (target == "Linear", target))
    rules += [(_target(fields, target), targets[target]) for target in general]
    return QuantizationConfig(tuple(rules), None)


def _is_general(target: str) -> bool:
    """Whether a target is no module's name."""
    return target == "Linear" or target.startswith("re:")


def _target(fields: _Fields, target: str) -> Test:
    if target == "Linear":
        return lambda name: True
    return fields.pattern(target.removeprefix("re:"))


def _compressed_storage(group: _Fields, fields: _Fields) -> Storage:
    """How the modules of one of the config_groups are stored."""
    layout = group.get("format") or fields.get("format")
    group.one_of("format", layout, ("pack-quantized", "int-quantized"))
    group.unset("output_activations")
    weights = _Fields(group.get("weights"), f"{group.where}.weights")
    weights.unset("dynamic", "block_structure")
    weights.one_of("type", weights.text("type", default="int").lower(), ("int",))
    bits = weights.number("num_bits", default=8)
    weights.one_of("num_bits", bits, tuple(range(1, 9)))
    scheme = "sym" if weights.flag("symmetric", True) else "asym"
    strategy = _strategy(weights)
    inputs = group.get("input_activations")
    if inputs is not None:
        group.one_of("format", layout, ("int-quantized",))
        weights.one_of("num_bits", bits, (8,))
        weights.one_of("symmetric", scheme == "sym", (True,))
        weights.one_of("strategy", strategy, ("channel", "tensor"))
        kind = _activations(_Fields(inputs, f"{group.where}.input_activations"))
        return Storage(layout, QuantSpec(8, -1, "sym", kind))
    weights.one_of("strategy", strategy, ("channel", "group"))
    group_size = -1 if strategy == "channel" else weights.group_size("group_size")
    return Storage(layout, QuantSpec(bits, group_size, scheme, WEIGHT_ONLY))


def _strategy(arguments: _Fields) -> str:
    """The strategy, which follows from the group size where it is not given."""
    size = arguments.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    return arguments.text("strategy", default=default).lower()


def _activations(inputs: _Fields) -> str:
    """The kind of layer that quantizes its inputs so."""
    inputs.one_of("type", inputs.text("type", default="int").lower(), ("int",))
    inputs.one_of("num_bits", inputs.number("num_bits", default=8), (8,))
    inputs.one_of("symmetric", inputs.flag("symmetric", True), (True,))
    found = (_strategy(inputs), inputs.flag("dynamic", False))
    for kind, choice in ACTIVATIONS.items():
        if found == choice:
            return kind
    raise inputs.error(
        f"strategy {_short(found[0])} and dynamic {_short(found[1])}",
        'QLLM reads "token" and true, or "tensor" and false',
    )


def _describe_compressed(
    specs: Mapping[str, QuantSpec], quantized: Mapping[str, QuantSpec], desc_act: bool
) -> dict[str, object]:
    (base, _), *others = Counter(quantized.values()).most_common()
    groups = []
    for spec in (base, *(spec for spec, _ in others)):
        named = [name for name in quantized if quantized[name] == spec]
        if spec == base:
            # vLLM's head is no "Linear"; its name is needed as well.
            named = ["Linear", *(name for name in named if name == LM_HEAD)]
        groups.append(_compressed_group(spec, named, desc_act))
    layouts = {group["format"] for group in groups}
    ignore = dict.fromkeys(name for name in specs if name not in quantized)
    if LM_HEAD not in quantized:
        ignore[LM_HEAD] = None
    config = {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": list(ignore),
    }
    if not others and base.kind == WEIGHT_ONLY and base.scheme == "asym":
        # transformers 5 has packed zero points only where it dequantizes while it loads; otherwise
        # it expects them unpacked, and refuses the file. It takes the first group for all modules.
        config["dequantize"] = True
    return config


def _compressed_group(spec: QuantSpec, targets: list[str], desc_act: bool) -> dict[str, object]:
    grouped = spec.kind == WEIGHT_ONLY and spec.group_size != -1
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.scheme == "sym",
        "strategy": "group" if grouped else "channel",
        "group_size": spec.group_size if grouped else None,
        "dynamic": False,
    }
    if desc_act and grouped:
        # Versions that know no weight_g_idx refuse this, rather than misread the weight.
        weights["actorder"] = "group"
    inputs = None
    if spec.kind != WEIGHT_ONLY:
        strategy, dynamic = ACTIVATIONS[spec.kind]
        inputs = {"num_bits": 8, "type": "int", "symmetric": True}
        inputs |= {"strategy": strategy, "dynamic": dynamic}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": "pack-quantized" if spec.kind == WEIGHT_ONLY else "int-quantized",
    }


# Kind of layer, to the strategy of its activations and whether that is dynamic.
ACTIVATIONS = {DYNAMIC: ("token", True), STATIC: ("tensor", False)}

METHODS: dict[str, Callable[[_Fields], QuantizationConfig]] = {
    "gptq": _parse_gptq,
    "awq": _parse_awq,
    "compressed-tensors": _parse_compressed,
}
