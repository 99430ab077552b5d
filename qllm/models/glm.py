"""GLM-4 (Team GLM 2024): Llama with biases of q, k and v, and RoPE in half of a head.

Pairs that RoPE rotates are neighbours in a file. GLM-4-0414 (`glm4`) norms what attention and MLP
give as well.
"""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
}
ENDS = [151329, 151336, 151338]  # where a file names none


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    if raw.values.get("eos_token_id") is None:
        raw = replace(raw, values={**raw.values, "eos_token_id": ENDS})
    config = llama.read_config(raw, partial=0.5)
    return replace(config, family="glm", output_bias=False, mlp_bias=False)


def read_glm4_config(raw: RawConfig) -> ModelConfig:
    return replace(read_config(raw), family="glm4", output_norms=True)


GLM: Family = replace(
    llama.LLAMA,
    name="glm",
    inner={**llama.LLAMA.inner, "mlp.up": ("mlp.gate_up_proj",)},
    read_config=read_config,
    interleaved_rope=True,
)
GLM4: Family = replace(
    GLM,
    name="glm4",
    inner={
        **GLM.inner,
        "attention_output_norm": ("post_self_attn_layernorm",),
        "mlp_output_norm": ("post_mlp_layernorm",),
    },
    read_config=read_glm4_config,
)
