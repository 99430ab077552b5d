"""Command R and Aya (Cohere 2024): one norm in front of attention and of the MLP beside it.

Norms have no bias, logits are scaled, and pairs that RoPE rotates are neighbours in a file. In
Command R7B (`cohere2`) layers with a window alone are rotated, others know nothing of positions.
"""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 255001,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults({"rope_theta": 5e5})
    if raw.flag("use_qk_norm", False):
        expected = "false: QLLM has no layernorms of queries and keys, as Command R+ has them"
        raise raw.error("use_qk_norm", True, expected)
    return _read(raw, "cohere")


def read_cohere2_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults({"sliding_window": 4096})
    config = _read(raw, "cohere2")
    every = raw.count("sliding_window_pattern", default=4)
    windows = raw.windows(config.num_layers, lambda index: (index + 1) % every != 0)
    rotated = tuple(window > 0 for window in windows) or (False,) * config.num_layers
    return replace(config, windows=windows, rope_layers=() if all(rotated) else rotated)


def _read(raw: RawConfig, family: str) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    return replace(
        llama.read_config(raw),
        family=family,
        norm="layernorm",
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        norm_bias=False,
        parallel_blocks=True,
        shared_norm=True,
        mlp_bias=False,
        logit_factor=raw.number("logit_scale", 0.0625),
    )


COHERE: Family = replace(
    llama.LLAMA,
    name="cohere",
    inner={key: parts for key, parts in llama.LLAMA.inner.items() if key != "mlp_norm"},
    read_config=read_config,
    interleaved_rope=True,
)
COHERE2: Family = replace(COHERE, name="cohere2", read_config=read_cohere2_config)
