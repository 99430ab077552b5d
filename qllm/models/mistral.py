"""Mistral (Jiang et al. 2023): Llama in which a token may see no further back than a window."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config = llama.read_config(raw)
    sliding = raw.values["sliding_window"] is not None
    windows = raw.windows(config.num_layers, lambda index: sliding)
    return replace(
        config,
        family="mistral",
        windows=windows,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
    )


MISTRAL: Family = replace(llama.LLAMA, name="mistral", read_config=read_config)
