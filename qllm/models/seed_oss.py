"""Seed-OSS (ByteDance 2025): Llama with biases of q, k and v, and heads of their own size."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "attention_bias": True,
    "eos_token_id": 2,
}


def read_config(raw: RawConfig) -> ModelConfig:
    config = llama.read_config(raw.with_defaults(DEFAULTS))
    return replace(config, family="seed_oss", output_bias=raw.flag("attention_out_bias", False))


SEED_OSS: Family = replace(llama.LLAMA, name="seed_oss", read_config=read_config)
