"""Granite 3's mixtures of experts (IBM 2024): Granite with experts in the place of its MLPs."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import granite
from qllm.models.family import Family, RawConfig, experts_of_all_layers
from qllm.models.mixtral import BLOCK
from qllm.models.stacks import DOWN, UP, Stack, stacks_of


def read_config(raw: RawConfig) -> ModelConfig:
    config = granite.read_config(raw)
    experts = experts_of_all_layers(raw, config, (8, 2), normalizes=True)
    return replace(config, family="granitemoe", mlp_bias=False, experts=experts)


_EXPERT = f"{BLOCK}experts.{{}}."
INNER = {
    **granite.GRANITE.inner,
    "mlp.router": (f"{BLOCK}router.layer",),
    UP: (f"{_EXPERT}gate_proj", f"{_EXPERT}up_proj"),
    DOWN: (f"{_EXPERT}down_proj",),
}

GRANITEMOE: Family = replace(
    granite.GRANITE,
    name="granitemoe",
    inner=INNER,
    read_config=read_config,
    stacks={
        f"{BLOCK}input_linear.weight": Stack(INNER[UP]),
        f"{BLOCK}output_linear.weight": Stack(INNER[DOWN], outer=0),
        **stacks_of(INNER, BLOCK),
    },
)
