"""Gemma 2 (Gemma Team 2024): norms on both sides, soft caps, windows in every other layer."""

from __future__ import annotations

import math
from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def read_config(raw: RawConfig) -> ModelConfig:
    return gemma_config(raw.with_defaults(DEFAULTS), "gemma2", every=2)


def gemma_config(raw: RawConfig, family: str, every: int) -> ModelConfig:
    """What Gemma 2 and 3 have in common.

    Args:
        raw: with the family's defaults.
        every: where no layer_types say it, each so many-th layer sees all, the others a window.
    """
    config = llama.read_config(raw)
    if raw.flag("use_bidirectional_attention", False):
        raise raw.error("use_bidirectional_attention", True, "false: QLLM generates text")
    return replace(
        config,
        family=family,
        mlp_bias=False,
        activation=raw.text("hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        output_norms=True,
        embed_scale=math.sqrt(config.hidden_size),
        embed_scale_rounds=True,
        score_scale=raw.number("query_pre_attn_scalar", 256) ** -0.5,
        windows=raw.windows(config.num_layers, lambda index: (index + 1) % every != 0),
        score_cap=read_cap(raw, "attn_logit_softcapping"),
        logit_cap=read_cap(raw, "final_logit_softcapping"),
    )


def read_cap(raw: RawConfig, key: str) -> float | None:
    """A cap of scores or logits; None: there is none."""
    return None if raw.values.get(key) is None else raw.number(key)


GEMMA2: Family = replace(
    llama.LLAMA,
    name="gemma2",
    inner={
        **llama.LLAMA.inner,
        "attention_output_norm": ("post_attention_layernorm",),
        "mlp_norm": ("pre_feedforward_layernorm",),
        "mlp_output_norm": ("post_feedforward_layernorm",),
    },
    read_config=read_config,
)
