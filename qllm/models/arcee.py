"""Arcee's foundation models (Arcee AI 2025): Llama whose MLP has no gate, and a squared ReLU."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 128001,
}


def read_config(raw: RawConfig) -> ModelConfig:
    config = llama.read_config(raw.with_defaults(DEFAULTS))
    return replace(config, family="arcee", gated_mlp=False)


ARCEE: Family = replace(
    llama.LLAMA,
    name="arcee",
    inner={**llama.LLAMA.inner, "mlp.up": ("mlp.up_proj",)},
    read_config=read_config,
)
