"""A model's modules by name, and what plans make of them."""

from __future__ import annotations

import pytest

from qllm.config import (
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError

# Two layers, named as OPT's: our names, and those of their parts in a Hugging Face checkpoint.
MODULES = {
    f"layers.{i}.{ours}": tuple(f"model.decoder.layers.{i}.{part}" for part in parts)
    for i in range(2)
    for ours, parts in {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.out_proj",),
        "mlp.up": ("fc1",),
        "mlp.down": ("fc2",),
    }.items()
}
FOUR = QuantSpec.parse("4")


DEFAULT_7 = QuantSpec(group_size=7, scheme="sym")


def found(plan: QuantPlan) -> dict[str, str]:
    """The bitwidth of every layer."""
    return {name: spec.bitwidth for name, spec in plan.resolve(MODULES, 2).items()}


def plan_of(value: dict) -> QuantPlan:
    return QuantPlan.from_json(value)


def assert_refused(call, *words: str) -> None:
    """One line that says these words."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
