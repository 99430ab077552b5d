"""Qwen3 (Yang et al. 2025): Llama with norms of queries and keys, and heads of their own size."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama, qwen2
from qllm.models.family import Family, RawConfig


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(qwen2.DEFAULTS | {"head_dim": 128})
    config = llama.read_config(raw)
    windows = qwen2.windows_of(raw, config)
    return replace(config, family="qwen3", mlp_bias=False, qk_norm=True, windows=windows)


QWEN3: Family = replace(
    llama.LLAMA,
    name="qwen3",
    inner={**llama.LLAMA.inner, "attention.qk_norm": ("self_attn.q_norm", "self_attn.k_norm")},
    read_config=read_config,
)
