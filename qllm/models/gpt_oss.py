"""gpt-oss (OpenAI 2025): a mixture of experts, attention sinks, windows in every other layer."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig, experts_of_all_layers
from qllm.models.qwen2_moe import EXPERTS
from qllm.models.rope import ORIGINAL
from qllm.models.stacks import gpt_oss_stacks
from qllm.ops.reference.rows import SWIGLU_ALPHA, SWIGLU_LIMIT

DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 36,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "attention_bias": True,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    ORIGINAL: 4096,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    if raw.values.get("rope_parameters") is None and not raw.values.get("rope_scaling"):
        raw = replace(raw, values={**raw.values, "rope_parameters": ROPE})
    for name, only in (("swiglu_alpha", SWIGLU_ALPHA), ("swiglu_limit", SWIGLU_LIMIT)):
        if raw.number(name, only) != only:
            raise raw.error(name, raw.values[name], f"{only}, as gpt-oss has it")
    config = llama.read_config(raw)
    experts = experts_of_all_layers(raw, config, (128, 4), normalizes=True, router_bias=True)
    return replace(
        config,
        family="gpt_oss",
        sinks=True,
        windows=raw.windows(config.num_layers, lambda index: index % 2 == 0),
        clamped_swiglu=True,
        mlp_bias=True,
        experts=experts,
    )


INNER = {
    **llama.LLAMA.inner,
    **EXPERTS,
    "mlp.router": ("mlp.router",),
    "attention.sinks": ("self_attn.sinks",),
}

GPT_OSS: Family = replace(
    llama.LLAMA,
    name="gpt_oss",
    inner=INNER,
    read_config=read_config,
    bare=INNER["attention.sinks"],
    stacks=gpt_oss_stacks(INNER),
)
