"""Ministral 3 (Mistral AI 2025): Mistral with YaRN, and queries that grow far into a text.

Attention spreads over more keys the further a text goes; what sharpens it again is Llama 4's factor
of queries, a logarithm of how many times the trained length has passed (Nakanishi 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama, mistral
from qllm.models.family import Family, RawConfig
from qllm.models.rope import ORIGINAL, read_rope

DEFAULTS = {
    "vocab_size": 131072,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    ORIGINAL: 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# Those whose cosines and sines depend on no length.
KINDS = ("default", "linear", "llama3", "yarn")
BETA = "llama_4_scaling_beta"


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    name = "rope_scaling" if raw.values.get("rope_scaling") else "rope_parameters"
    if raw.values.get(name) is None:
        raw = replace(raw, values={**raw.values, name: ROPE})
    config = llama.read_config(raw)
    assert config.rope is not None
    # Which `llama.read_config` has found to be an object.
    own = raw.values[name]
    scaling = RawConfig(own if isinstance(own, Mapping) else {}, f"{raw.where}: {name}")
    beta = scaling.values.get(BETA)
    rope = read_rope(raw, config.trained_positions, config.head_dim, kinds=KINDS)
    if beta != 0:
        span = rope.original_max_positions or scaling.count(ORIGINAL)
        rope = replace(rope, query_beta=scaling.number(BETA), query_span=span)
    window = raw.values.get("sliding_window")
    windows = () if window is None else (raw.count("sliding_window"),) * config.num_layers
    return replace(
        config,
        family="ministral3",
        rope=rope,
        windows=windows,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
    )


MINISTRAL3: Family = replace(mistral.MISTRAL, name="ministral3", read_config=read_config)
