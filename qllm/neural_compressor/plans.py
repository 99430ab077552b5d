"""Which layer gets which spec: what the user's dictionaries say, and what is tried after them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qllm.config import LM_HEAD, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.neural_compressor.config import CONFIG, PostTrainingQuantConfig
from qllm.neural_compressor.rules import to_rules
from qllm.patterns import Patterns

HEAD_RULE = f"^{LM_HEAD}$"
# What is tried when the user's configuration is not good enough: algorithm, group size, scheme,
# and whether the last matrix product, which is the head, is left at 16 bits.
WOQ_TUNE = {
    "RTN_G32ASYM": ("rtn", 32, "asym", False),
    "GPTQ_G32ASYM": ("gptq", 32, "asym", False),
    "GPTQ_G32ASYM_DISABLE_LAST_MATMUL": ("gptq", 32, "asym", True),
    "GPTQ_G128ASYM": ("gptq", 128, "asym", False),
    "AWQ_G32ASYM": ("awq", 32, "asym", False),
}


def _weight_options(where: str, entry: object) -> dict[str, list]:
    """The `weight` of an entry of op_type_dict or op_name_dict: key to the values it may have."""
    if not isinstance(entry, Mapping) or set(entry) - {"weight", "activation"}:
        raise UserError(f'{where} is {entry}; write {{"weight": {{"bits": 4, …}}}}')
    for key, value in (entry.get("activation") or {}).items():
        if key != "dtype" or set(_listed(value)) != {"fp32"}:
            raise UserError(f"{where}: activation {key}={value!r} cannot be had; give dtype 'fp32'")
    weight = entry.get("weight") or {}
    if not isinstance(weight, Mapping):
        raise UserError(f'{where} is {entry}; write {{"weight": {{"bits": 4, …}}}}')
    found = {"bit" if key == "bits" else key: _listed(value) for key, value in weight.items()}
    for key, values in found.items():
        if not values:
            raise UserError(f"{where}: {key} is an empty list")
    return found


def _listed(value: object) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_float(weight: Mapping[str, Any]) -> bool:
    return str(weight.get("dtype", "int")) in ("fp32", "fp16", "bf16")


def user_plans(conf: PostTrainingQuantConfig) -> Iterator[QuantPlan]:
    """The plans that the user's dictionaries span, the first values of all lists first.

    Raises:
        UserError: for entries that have no meaning here.
    """
    by_type = {
        pattern: _weight_options(f"op_type_dict: {pattern!r}", entry)
        for pattern, entry in (conf.op_type_dict or {".*": {}}).items()
    }
    by_name = {
        pattern: _weight_options(f"op_name_dict: {pattern!r}", entry)
        for pattern, entry in (conf.op_name_dict or {}).items()
    }
    axes = [
        [(table, pattern, key, value) for value in values]
        for table, entries in enumerate((by_type, by_name))
        for pattern, options in entries.items()
        for key, values in options.items()
    ]
    for chosen in itertools.product(*axes):
        tables: list[dict[str, dict]] = [{p: {} for p in entries} for entries in (by_type, by_name)]
        for table, pattern, key, value in chosen:
            tables[table][pattern][key] = value
        general = list(tables[0].values())[-1]
        for pattern, weight in tables[1].items():  # what it leaves out is as for the type
            if not _is_float(weight) and not _is_float(general):
                tables[1][pattern] = general | weight
        names = ("op_type_dict", "op_name_dict")
        value = {
            name: {pattern: {"weight": weight} for pattern, weight in entries.items()}
            for name, entries in zip(names, tables, strict=True)
        }
        yield QuantPlan.from_json(to_rules(value, CONFIG), CONFIG)


def tuned_plan(plan: QuantPlan, name: str) -> QuantPlan:
    """A plan with the algorithm and grids of a row of WOQ_TUNE; its bits are kept."""
    algorithm, group_size, scheme, disable_last = WOQ_TUNE[name]

    def tuned(spec: QuantSpec) -> QuantSpec:
        if spec.kind != "weight_only":
            return spec
        return replace(spec, algorithm=algorithm, group_size=group_size, scheme=scheme)

    rules = [(pattern, tuned(spec)) for pattern, spec in plan.rules]
    if disable_last:
        rules.append((HEAD_RULE, QuantSpec()))
    return replace(plan, rules=tuple(rules))


def model_plan(
    conf: PostTrainingQuantConfig, plan: QuantPlan, modules: Mapping[str, Sequence[str]]
) -> QuantPlan:
    """A plan for one model: the recipes' say on the head, and no exception for what is not there.

    Args:
        modules: as for QuantPlan.resolve.
    """
    rules = list(plan.rules)
    everywhere = rules[0][1]  # the rule by type
    if conf.arguments("gptq_args").get("lm_head") and everywhere.algorithm == "gptq":
        rules.insert(1, (HEAD_RULE, everywhere))  # in front of the rules by name, which win
    if conf.recipes.get("last_conv_or_matmul_quantization") is False:
        rules.append((HEAD_RULE, QuantSpec()))
    names = {LM_HEAD, *modules, *itertools.chain(*modules.values())}
    patterns = Patterns(plan.text)
    rules = [
        (pattern, spec)
        for pattern, spec in rules
        if spec.kind != "dense" or any(patterns.search(pattern, name) for name in names)
    ]
    return replace(plan, rules=tuple(rules))
