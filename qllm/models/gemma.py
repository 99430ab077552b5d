"""Gemma (Gemma Team 2024), the first one: Llama with scaled embeddings, and 1 added to norms."""

from __future__ import annotations

import math
from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def read_config(raw: RawConfig) -> ModelConfig:
    config = llama.read_config(raw.with_defaults(DEFAULTS))
    if raw.flag("use_bidirectional_attention", False):
        raise raw.error("use_bidirectional_attention", True, "false: QLLM generates text")
    # Released files say "gelu" for what the model was trained with.
    activation = "gelu_tanh" if config.activation == "gelu" else config.activation
    return replace(
        config,
        family="gemma",
        activation=activation,
        mlp_bias=False,
        norm_offset=1.0,
        embed_scale=math.sqrt(config.hidden_size),
        embed_scale_rounds=True,
    )


GEMMA: Family = replace(llama.LLAMA, name="gemma", read_config=read_config)
