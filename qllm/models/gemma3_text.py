"""Gemma 3's language model (Gemma Team 2025): Gemma 2 with norms of queries and keys for caps.

Layers with a window rotate queries and keys by a base of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import gemma2
from qllm.models.family import Family, RawConfig
from qllm.models.rope import reach, read_rope

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
    ropes = raw.values.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping):
        raise raw.error("rope_parameters", ropes, "an object")
    plain = {key: value for key, value in raw.values.items() if not key.startswith("rope_")}
    every = raw.count("sliding_window_pattern", default=6)
    config = gemma2.gemma_config(RawConfig(plain, raw.where), "gemma3_text", every)
    # transformers 4 had one setting for layers that see all, and a base for the others.
    old = raw.values.get("rope_scaling") or {}
    theta = raw.number("rope_theta", GLOBAL_THETA)
    local_theta = raw.number("rope_local_base_freq", LOCAL_THETA)
    found = []
    for kind, base, more in (
        ("full_attention", theta, old),
        ("sliding_attention", local_theta, {}),
    ):
        own = ropes.get(kind) or {}
        for value in (own, more):
            if not isinstance(value, Mapping):
                raise raw.error(f"the RoPE of {kind}", value, "an object")
        values = {"rope_parameters": {"rope_theta": base, **own, **more}}
        where = f"{raw.where}: {kind}"
        found.append(read_rope(RawConfig(values, where), config.trained_positions, config.head_dim))
    return replace(
        config,
        qk_norm=True,
        score_cap=None,  # Gemma 3's attention takes no notice of it
        rope=found[0],
        window_rope=found[1],
        max_positions=reach(found[0], config.trained_positions),
    )


GEMMA3_TEXT: Family = replace(
    gemma2.GEMMA2,
    name="gemma3_text",
    inner={**gemma2.GEMMA2.inner, "attention.qk_norm": ("self_attn.q_norm", "self_attn.k_norm")},
    read_config=read_config,
)
