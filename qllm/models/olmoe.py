"""OLMoE (Muennighoff et al. 2024): a mixture of experts, and norms of all queries and keys."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig, experts_of_all_layers
from qllm.models.qwen2_moe import EXPERTS, STACKS

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "rms_norm_eps": 1e-5,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    if raw.values.get("clip_qkv") is not None:
        raise raw.error("clip_qkv", raw.values["clip_qkv"], "null: QLLM does not clip q, k and v")
    config = llama.read_config(raw)
    experts = experts_of_all_layers(
        raw, config, (64, 8), normalizes=raw.flag("norm_topk_prob", False)
    )
    return replace(
        config, family="olmoe", mlp_bias=False, qk_norm=True, wide_qk_norm=True, experts=experts
    )


OLMOE: Family = replace(
    llama.LLAMA,
    name="olmoe",
    inner={
        **llama.LLAMA.inner,
        **EXPERTS,
        "attention.qk_norm": ("self_attn.q_norm", "self_attn.k_norm"),
    },
    read_config=read_config,
    stacks=STACKS,
)
