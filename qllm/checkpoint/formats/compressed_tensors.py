"""The settings of compressed-tensors, whose modules are in one of several formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from qllm.checkpoint.formats.base import Format
from qllm.checkpoint.formats.floats import find_floats
from qllm.checkpoint.formats.int_quantized import IntQuantized
from qllm.checkpoint.formats.pack_quantized import PackQuantized
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, Test, short
from qllm.config import LM_HEAD, QuantSpec

FORMATS: dict[str, type[Format]] = {format.name: format for format in (PackQuantized, IntQuantized)}
# Of numbers that are small floats: bits of each.
FLOAT_LAYOUTS = {
    **dict.fromkeys(("float-quantized", "naive-quantized", "mxfp8-quantized"), 8),
    **dict.fromkeys(("nvfp4-pack-quantized", "mxfp4-pack-quantized"), 4),
}
# The last part of what Hugging Face's families, and QLLM, call an embedding of tokens, or of
# positions, which is of the same class there.
EMBEDDINGS = (
    *("embed_tokens", "word_embeddings", "wte", "embed_in", "embed"),
    *("embed_positions", "wpe", "positions"),
)
CLASSES = ("Linear", "Embedding")  # of which a target may be all modules
# Kind of layer, to the strategy of its activations and whether that is dynamic.
ACTIVATIONS = {"w8a8_dynamic": ("token", True), "w8a8_static": ("tensor", False)}


def parse(fields: Fields) -> QuantizationConfig:
    """https://github.com/vllm-project/compressed-tensors: a name is stronger than a pattern, a
    pattern than the class of all linear layers; what is ignored is so before all of them."""
    fields.unset("transform_config")
    cache = fields.get("kv_cache_scheme")
    if cache is not None:  # of floats: keys and values have more bits here
        scheme = Fields(cache, f"{fields.where}.kv_cache_scheme")
        scheme.one_of("type", scheme.text("type", default="int").lower(), ("float",))
    sparsity = fields.get("sparsity_config")
    if sparsity is not None:
        sparse = Fields(sparsity, f"{fields.where}.sparsity_config")
        sparse.one_of("format", sparse.text("format", default="dense"), ("dense",))
    ignored = fields.texts("ignore")
    rules: list[tuple[Test, Format | None]] = [(frozenset(ignored).__contains__, None)]
    rules += [(_target(fields, target), None) for target in ignored if _is_general(target)]
    targets: dict[str, Format | None] = {}
    for group in fields.objects("config_groups").values():
        storage = _format(group, fields)
        targets.update(dict.fromkeys(group.texts("targets"), storage))
    if not targets:
        raise fields.error("no config_groups with targets", "it says of no module how it is stored")
    named: dict[Format | None, set[str]] = {}
    for target, storage in targets.items():
        named.setdefault(storage, set()).add(target)
    rules += [(names.__contains__, storage) for storage, names in named.items()]
    general = sorted(filter(_is_general, targets), key=lambda target: (target in CLASSES, target))
    rules += [(_target(fields, target), targets[target]) for target in general]
    return QuantizationConfig(tuple(rules), None, find_floats)


def _is_general(target: str) -> bool:
    """Whether a target is no module's name."""
    return target in CLASSES or target.startswith("re:")


def _target(fields: Fields, target: str) -> Test:
    if target in CLASSES:
        return lambda name: _is_embedding(name) == (target == "Embedding")
    return fields.pattern(target.removeprefix("re:"))


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in EMBEDDINGS


def _format(group: Fields, fields: Fields) -> Format | None:
    """How the modules of one of the config_groups are stored; None as small floats."""
    layout = group.get("format") or fields.get("format")
    group.unset("output_activations")
    weights = Fields(group.get("weights"), f"{group.where}.weights")
    if layout in FLOAT_LAYOUTS:
        weights.one_of("type", weights.text("type", default="int").lower(), ("float",))
        weights.one_of("num_bits", weights.number("num_bits"), (FLOAT_LAYOUTS[layout],))
        weights.one_of("symmetric", weights.flag("symmetric", True), (True,))
        return None
    group.one_of("format", layout, (*FORMATS, *FLOAT_LAYOUTS))
    weights.unset("dynamic", "block_structure")
    weights.one_of("type", weights.text("type", default="int").lower(), ("int",))
    bits = weights.number("num_bits", default=8)
    weights.one_of("num_bits", bits, tuple(range(1, 9)))
    scheme = "sym" if weights.flag("symmetric", True) else "asym"
    strategy = _strategy(weights)
    inputs = group.get("input_activations")
    if inputs is not None and _are_floats(inputs):
        inputs = None  # which stay at 16 bits
    if inputs is not None:
        group.one_of("format", layout, (IntQuantized.name,))
        weights.one_of("num_bits", bits, (8,))
        weights.one_of("symmetric", scheme == "sym", (True,))
        weights.one_of("strategy", strategy, ("channel", "tensor"))
        kind = _activations(Fields(inputs, f"{group.where}.input_activations"))
        return FORMATS[layout](QuantSpec(8, -1, "sym", kind))
    weights.one_of("strategy", strategy, ("channel", "group"))
    group_size = -1 if strategy == "channel" else weights.group_size("group_size")
    return FORMATS[layout](QuantSpec(bits, group_size, scheme, "weight_only"))


def _are_floats(activations: Any) -> bool:
    return isinstance(activations, dict) and activations.get("type") == "float"


def _strategy(arguments: Fields) -> str:
    """The strategy, which follows from the group size where it is not given."""
    size = arguments.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    return arguments.text("strategy", default=default).lower()


def _activations(inputs: Fields) -> str:
    """The kind of layer that quantizes its inputs so."""
    inputs.one_of("type", inputs.text("type", default="int").lower(), ("int",))
    inputs.one_of("num_bits", inputs.number("num_bits", default=8), (8,))
    inputs.one_of("symmetric", inputs.flag("symmetric", True), (True,))
    found = (_strategy(inputs), inputs.flag("dynamic", False))
    for kind, choice in ACTIVATIONS.items():
        if found == choice:
            return kind
    raise inputs.error(
        f"strategy {short(found[0])} and dynamic {short(found[1])}",
        'QLLM reads "token" and true, or "tensor" and false',
    )


def describe(
    specs: Mapping[str, QuantSpec], quantized: Mapping[str, QuantSpec], desc_act: bool
) -> dict[str, Any]:
    (base, _), *others = Counter(quantized.values()).most_common()
    groups = []
    for spec in (base, *(spec for spec, _ in others)):
        named = [name for name in quantized if quantized[name] == spec]
        embeddings = [name for name in named if _is_embedding(name)]
        if spec == base:
            # vLLM's head is no "Linear"; its name is needed as well.
            named = ["Linear", *(name for name in named if name == LM_HEAD)]
        # vLLM does not tell all embeddings what is in front of their names.
        ends = [f"re:(.*\\.)?{name.rpartition('.')[2]}$" for name in embeddings]
        named = [*(name for name in named if name not in embeddings), *ends]
        groups.append(_group(spec, named, desc_act))
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
    packed = any(map(_is_embedding, quantized))  # which it would draw at random, and say nothing
    if not (others or packed) and base.kind == "weight_only" and base.scheme == "asym":
        # transformers 5 has packed zero points only where it dequantizes while it loads; otherwise
        # it expects them unpacked, and refuses the file. It takes the first group for all modules.
        config["dequantize"] = True
    return config


def _group(spec: QuantSpec, targets: list[str], desc_act: bool) -> dict[str, Any]:
    grouped = spec.kind == "weight_only" and spec.group_size != -1
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
    if spec.kind != "weight_only":
        strategy, dynamic = ACTIVATIONS[spec.kind]
        inputs = {"num_bits": 8, "type": "int", "symmetric": True}
        inputs |= {"strategy": strategy, "dynamic": dynamic}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": next(name for name, format in FORMATS.items() if format.holds(spec)),
    }
