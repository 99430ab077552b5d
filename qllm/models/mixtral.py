"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in the place of its MLPs."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig, experts_of_all_layers
from qllm.models.mistral import read_config as read_mistral
from qllm.models.stacks import stacks_of

DEFAULTS = {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config = read_mistral(raw)
    experts = experts_of_all_layers(raw, config, (8, 2), normalizes=True)
    return replace(config, family="mixtral", experts=experts)


BLOCK = "block_sparse_moe."
_EXPERT = f"{BLOCK}experts.{{}}."
INNER = {
    **llama.LLAMA.inner,
    "mlp.router": (f"{BLOCK}gate",),
    "mlp.experts.{}.up": (f"{_EXPERT}w1", f"{_EXPERT}w3"),
    "mlp.experts.{}.down": (f"{_EXPERT}w2",),
}

MIXTRAL: Family = replace(
    llama.LLAMA,
    name="mixtral",
    inner=INNER,
    read_config=read_config,
    stacks=stacks_of(INNER, BLOCK),
)
