"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, matrices (in, out)."""

from __future__ import annotations

from qllm.config import ModelConfig
from qllm.models.family import MAX_LAYERS, Family, RawConfig, check_heads


def read_config(raw: RawConfig) -> ModelConfig:
    # Of each pair the first one wins in transformers, too.
    hidden = raw.count("hidden_size", "n_embd", default=768)
    heads = raw.count("num_attention_heads", "n_head", default=12)
    check_heads(raw, hidden, heads)
    if raw.flag("add_cross_attention", False):
        raise raw.error("add_cross_attention", True, "false")
    return ModelConfig(
        family="gpt2",
        vocab_size=raw.count("vocab_size", default=50257),
        hidden_size=hidden,
        num_layers=raw.count("num_hidden_layers", "n_layer", default=12, maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=raw.count("n_inner", default=4 * hidden),
        embed_size=hidden,
        max_positions=raw.count("max_position_embeddings", "n_positions", default=1024),
        position="learned",
        norm="layernorm",
        norm_eps=raw.number("layer_norm_epsilon", 1e-5),
        score_scale=None if raw.flag("scale_attn_weights", True) else 1.0,
        scale_by_layer=raw.flag("scale_attn_by_inverse_layer_idx", False),
        activation=raw.text("activation_function", "gelu_new"),
        tied_head=raw.flag("tie_word_embeddings", True),
        dtype=raw.text("dtype", raw.text("torch_dtype", None)),
        init_std=raw.number("initializer_range", 0.02),
        eos_token_ids=raw.tokens("eos_token_id"),
    )


GPT2 = Family(
    name="gpt2",
    prefixes=("transformer.", ""),
    outer={"embed": "wte", "positions": "wpe", "final_norm": "ln_f"},
    layer="h.{}.",
    inner={
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
    read_config=read_config,
    transposed=True,
    ignored=(".attn.masked_bias", ".attn.bias"),
)
