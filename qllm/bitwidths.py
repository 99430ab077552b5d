"""What a user may give as a bitwidth, as a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qllm.config import BITWIDTHS, QuantPlan, QuantSpec, read_plan_file
from qllm.errors import UserError

# One value for all layers, one for each, rules by module name or their file, or a plan.
Bitwidth = int | str | Path | Sequence[int | str] | Mapping[str, Any] | QuantPlan


def make_plan(
    bitwidth: Bitwidth | None,
    default: QuantSpec | None = None,
    lm_head_bits: int | str | None = None,
    embedding_bits: int | str | None = None,
) -> QuantPlan:
    """The plan that a bitwidth stands for; see `LLM.from_pretrained`.

    Args:
        bitwidth: None is 16, or what a quantized checkpoint has.
        default: has the group size, scheme and algorithm of values that name none.

    Raises:
        UserError: for what is no plan.
    """
    if bitwidth is None:
        plan = QuantPlan.uniform(QuantSpec())
    elif isinstance(bitwidth, QuantPlan):
        plan = bitwidth
    elif isinstance(bitwidth, Mapping):
        plan = _plan_of(bitwidth, "the plan", default)
    elif isinstance(bitwidth, Path) or str(bitwidth).strip().endswith(".json"):
        path = Path(str(bitwidth).strip())
        plan = _plan_of(read_plan_file(path), str(path), default)
    elif isinstance(bitwidth, int | str):
        plan = QuantPlan.parse(str(bitwidth), default)
    elif isinstance(bitwidth, Iterable):
        plan = QuantPlan.parse(",".join(map(str, bitwidth)), default)
    else:
        raise UserError(f"bitwidth {bitwidth!r} is unknown; choose from {', '.join(BITWIDTHS)}")
    if not isinstance(bitwidth, QuantPlan):
        plan = replace(plan, names_layers=bitwidth is not None)
    return plan.with_outer(lm_head_bits, embedding_bits, default or QuantSpec())


def check_rounding(plans: Sequence[QuantPlan], group_size: int | None, scheme: str | None) -> None:
    """Refuse a group size or a scheme where no plan has layers that follow it.

    Args:
        group_size, scheme: None where it was not given.

    Raises:
        UserError: naming the first that was given.
    """
    grouped = [spec for plan in plans for _, spec in plan.rules if spec.kind == "weight_only"]
    for name, value, followed in (
        ("group_size", group_size, {spec.group_size for spec in grouped}),
        ("scheme", scheme, {spec.scheme for spec in grouped}),
    ):
        if value is None or value in followed:
            continue
        if grouped:
            raise UserError(
                f"`{name}` {value} does nothing here: the plan's rules all have their own; "
                "leave it out"
            )
        raise UserError(
            f"`{name}` {value} does nothing without `bitwidth`, `lm_head_bits` or "
            "`embedding_bits` of 1 to 8: 8:tc-li and 8:tc have a scale per channel, and a "
            "quantized checkpoint keeps its own groups; leave it out"
        )


def _plan_of(value: Mapping[str, Any], text: str, default: QuantSpec | None) -> QuantPlan:
    """The plan that a JSON object is, in our shape or in Neural Compressor's."""
    from qllm.neural_compressor import rules

    if not value:
        raise UserError(f"{text} has no rules; write bits by names of modules, such as {{'.*': 4}}")
    if set(value) & rules.KEYS:
        value = rules.to_rules(value, text)
    return QuantPlan.from_json(value, text, default)
