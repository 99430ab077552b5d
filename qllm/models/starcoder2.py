"""StarCoder2 (Lozhkov et al. 2024): RoPE, grouped key-value heads, windows, LayerNorm, biases."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "initializer_range": 0.018042,
    "tie_word_embeddings": True,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config, bias = llama.read_config(raw), raw.flag("use_bias", True)
    window = 0 if raw.values.get("sliding_window") is None else raw.count("sliding_window")
    return replace(
        config,
        family="starcoder2",
        norm="layernorm",
        norm_eps=raw.number("norm_epsilon", 1e-5),
        # All layers have the window, whatever the file says of their types.
        windows=(window,) * config.num_layers if window else (),
        gated_mlp=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


STARCODER2: Family = replace(
    llama.LLAMA,
    name="starcoder2",
    inner={**llama.LLAMA.inner, "mlp.up": ("mlp.c_fc",), "mlp.down": ("mlp.c_proj",)},
    read_config=read_config,
)
