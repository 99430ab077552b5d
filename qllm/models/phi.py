"""Phi-1 to Phi-2 (Li et al. 2023): one norm in front of attention and the MLP beside it, biases.

RoPE rotates a part of a head, and the LM head has a bias.
"""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "hidden_act": "gelu_new",
    "eos_token_id": 2,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    for name, lacks in (
        ("qk_layernorm", "layernorms of queries and keys"),
        ("tie_word_embeddings", "head that has a bias and is tied"),
    ):
        if raw.flag(name, False):
            raise raw.error(name, True, f"false: QLLM has no {lacks}")
    return replace(
        llama.read_config(raw, partial=0.5),
        family="phi",
        norm="layernorm",
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        gated_mlp=False,
        parallel_blocks=True,
        shared_norm=True,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )


PHI: Family = replace(
    llama.LLAMA,
    name="phi",
    outer={"embed": "embed_tokens", "final_norm": "final_layernorm"},
    inner={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": llama.LLAMA.inner["attention.qkv"],
        "attention.out": ("self_attn.dense",),
        "mlp.up": ("mlp.fc1",),
        "mlp.down": ("mlp.fc2",),
    },
    read_config=read_config,
)
