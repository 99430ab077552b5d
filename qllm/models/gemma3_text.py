"""Gemma 3's language model (Gemma Team 2025): Gemma 2 with norms of queries and keys for caps.

Layers with a window rotate queries and keys by a base of their own.
"""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import gemma2
from qllm.models.family import Family, RawConfig
from qllm.models.rope import reach, read_ropes

DEFAULTS = gemma2.DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    if raw.flag("use_bidirectional_attention", False):  # EmbeddingGemma, which writes no text
        raise raw.error("use_bidirectional_attention", True, "false: a token sees none behind it")
    plain = {key: value for key, value in raw.values.items() if not key.startswith("rope_")}
    every = raw.count("sliding_window_pattern", default=6)
    config = gemma2.gemma_config(RawConfig(plain, raw.where), "gemma3_text", every)
    thetas = (
        raw.number("rope_theta", GLOBAL_THETA),
        raw.number("rope_local_base_freq", LOCAL_THETA),
    )
    rope, window_rope = read_ropes(raw, config.trained_positions, (config.head_dim,) * 2, thetas)
    return replace(
        config,
        qk_norm=True,
        score_cap=None,  # Gemma 3's attention takes no notice of it
        rope=rope,
        window_rope=window_rope,
        max_positions=reach(rope, config.trained_positions),
    )


GEMMA3_TEXT: Family = replace(
    gemma2.GEMMA2,
    name="gemma3_text",
    inner={**gemma2.GEMMA2.inner, "attention.qk_norm": ("self_attn.q_norm", "self_attn.k_norm")},
    read_config=read_config,
)
