"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases in front of attention."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}


def read_config(raw: RawConfig) -> ModelConfig:
    if raw.flag("use_sliding_window", False):
        raise raw.error("use_sliding_window", True, "false")
    config = llama.read_config(raw.with_defaults(DEFAULTS))
    biases = {"attention_bias": True, "output_bias": False, "mlp_bias": False}
    return replace(config, family="qwen2", **biases)


QWEN2: Family = replace(llama.LLAMA, name="qwen2", read_config=read_config)
