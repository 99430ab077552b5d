"""StableLM 3B and 2 (Stability AI 2023): Llama with LayerNorm, and RoPE in a quarter of a head."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "eos_token_id": 0,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    if raw.flag("qk_layernorm", False):
        expected = "false: QLLM has no layernorms of queries and keys, as StableLM 2 12B has them"
        raise raw.error("qk_layernorm", True, expected)
    parallel = raw.flag("use_parallel_residual", False)
    # Its heads share out the hidden size, whatever a file says of them.
    config = llama.read_config(replace(raw, values={**raw.values, "head_dim": None}), partial=0.25)
    return replace(
        config,
        family="stablelm",
        norm="layernorm",
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        attention_bias=raw.flag("use_qkv_bias", False),
        output_bias=False,
        mlp_bias=False,
        parallel_blocks=parallel,
        shared_norm=parallel,
    )


STABLELM: Family = replace(llama.LLAMA, name="stablelm", read_config=read_config)
