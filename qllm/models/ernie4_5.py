"""ERNIE 4.5 without experts (Baidu 2025): Llama whose RoPE rotates neighbours."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 103424,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def read_config(raw: RawConfig) -> ModelConfig:
    config, bias = llama.read_config(raw.with_defaults(DEFAULTS)), raw.flag("use_bias", False)
    return replace(config, family="ernie4_5", attention_bias=bias, output_bias=bias, mlp_bias=bias)


ERNIE4_5: Family = replace(
    llama.LLAMA, name="ernie4_5", read_config=read_config, interleaved_rope=True
)
