"""Neural Compressor's configurations as the rules of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qllm.errors import UserError
from qllm.patterns import Patterns

KEYS = {"op_type_dict", "op_name_dict"}


def to_rules(value: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The rules of a Neural Compressor configuration: those by name win over those by type.

    `{"op_type_dict": {".*": {"weight": {"bit": [4], "group_size": [32], "scheme": ["asym"],
    "algorithm": ["RTN"]}}}, "op_name_dict": …}`: of a list, which spans a space to search there,
    the first entry counts. A type is a regular expression over class names, of which "Linear" is
    the one that is quantized; a name's expression has to match all of it. What an entry leaves out
    is as Neural Compressor has it: 4 bits in groups of 32, symmetric, to nearest, for all types.

    Raises:
        UserError: for keys, types or values that have no meaning here.
    """
    unknown = set(value) - KEYS
    tables = [value.get(key) or {} for key in ("op_type_dict", "op_name_dict")]
    if unknown or not all(isinstance(table, Mapping) for table in tables):
        raise UserError(f"{text}: beside op_type_dict and op_name_dict there is {sorted(unknown)}")
    rules: dict[str, Any] = {}
    by_type, by_name = tables[0] or {".*": {"weight": {}}}, tables[1]
    patterns = Patterns(text)
    for pattern, entry in by_type.items():
        if not patterns.fullmatch(pattern, "Linear"):
            raise UserError(f"{text}: op_type_dict: {pattern!r} does not match 'Linear'")
        rules[".*"] = _to_spec(entry, f"{text}: {pattern!r}")
    for pattern, entry in by_name.items():
        rules[f"^(?:{pattern})$"] = _to_spec(entry, f"{text}: {pattern!r}")
    return rules


def _to_spec(entry: object, where: str) -> dict[str, Any]:
    given: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    weight = given.get("weight")
    if not isinstance(weight, Mapping) or set(given) - {"weight", "activation"}:
        raise UserError(f'{where} is {entry}; write {{"weight": {{"bit": [4], …}}}}')
    first = {
        key: value[0] if isinstance(value, list | tuple) and value else value
        for key, value in weight.items()
    }
    activation = given.get("activation") or {"dtype": "fp32"}
    if activation not in ({"dtype": "fp32"}, {"dtype": ["fp32"]}):
        raise UserError(f"{where}: activation {activation} cannot be; with these it stays fp32")
    names = {"bit": "bits", "bits": "bits", "group_size": "group_size", "scheme": "scheme"}
    unknown = set(first) - set(names) - {"algorithm", "dtype"}
    if unknown:
        raise UserError(f"{where}: QLLM knows no {sorted(unknown)[0]!r}")
    dtype = first.get("dtype", "int")
    if dtype in ("fp32", "fp16", "bf16"):
        return {"bits": 16}
    if dtype not in ("int", "int8", "int4"):
        raise UserError(f"{where}: QLLM has no weights of type {dtype!r}; it has int")
    spec = {names[key]: value for key, value in first.items() if key in names}
    if "algorithm" in first:
        name = str(first["algorithm"]).lower()
        spec["algorithm"] = "signround" if name == "autoround" else name
    bits = 8 if dtype == "int8" else 4
    return {"bits": bits, "group_size": 32, "scheme": "sym", "algorithm": "rtn"} | spec
