"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama whose file has q, k, v, and gate, up in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig
from qllm.models.rope import ORIGINAL, read_rope

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    ORIGINAL: 4096,
    "rms_norm_eps": 1e-5,
}
# What older files call LongRoPE.
LONGROPE = ("su", "yarn")


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    values = {key: _renamed(raw.values.get(key)) for key in ("rope_scaling", "rope_parameters")}
    raw = RawConfig({**raw.values, **values}, raw.where)
    config = llama.read_config(RawConfig({**raw.values, **dict.fromkeys(values)}, raw.where))
    rope = read_rope(
        raw, config.trained_positions, config.head_dim, kinds=("default", "longrope"), partial=1.0
    )
    rope = replace(rope, rereads=rope.kind == "longrope")
    sliding = raw.values.get("sliding_window") is not None
    windows = raw.windows(config.num_layers, lambda index: sliding)
    return replace(
        config,
        family="phi3",
        rope=rope,
        windows=windows,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
    )


def _renamed(rope: object) -> object:
    """Settings of RoPE with today's name of their kind."""
    if not isinstance(rope, Mapping):
        return rope
    kind = rope.get("rope_type", rope.get("type"))
    return {**rope, "rope_type": "longrope"} if kind in LONGROPE else rope


PHI3: Family = replace(
    llama.LLAMA,
    name="phi3",
    inner={
        **llama.LLAMA.inner,
        "attention.qkv": ("self_attn.qkv_proj",),
        "mlp.up": ("mlp.gate_up_proj",),
    },
    read_config=read_config,
)
