"""Qwen3-MoE (Yang et al. 2025): Qwen3 with a mixture of experts in the place of MLPs."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig
from qllm.models.qwen2_moe import EXPERTS, STACKS, read_experts
from qllm.models.qwen3 import QWEN3

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 24,
    "sliding_window": 4096,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config = llama.read_config(raw)
    # One kind of attention in all layers, whatever their `layer_types` would be in Qwen3.
    sliding = raw.flag("use_sliding_window", False) and raw.values["sliding_window"] is not None
    windows = (raw.count("sliding_window"),) * config.num_layers if sliding else ()
    experts = read_experts(raw, config, counts=(128, 8), inner=768, shared=0)
    return replace(
        config,
        family="qwen3_moe",
        mlp_bias=False,
        qk_norm=True,
        windows=windows,
        experts=experts,
    )


QWEN3_MOE: Family = replace(
    QWEN3,
    name="qwen3_moe",
    inner={**QWEN3.inner, **EXPERTS},
    read_config=read_config,
    stacks=STACKS,
)
