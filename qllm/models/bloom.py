"""BLOOM (Le Scao et al. 2022): ALiBi, a norm after the embedding, GELU, biases, a tied head."""

from __future__ import annotations

from qllm.config import ModelConfig
from qllm.models.family import MAX_LAYERS, Family, RawConfig, check_heads


def read_config(raw: RawConfig) -> ModelConfig:
    # Of each pair the first one wins in transformers, too.
    hidden = raw.count("n_embed", "hidden_size", default=64)
    heads = raw.count("num_attention_heads", "n_head", default=8)
    check_heads(raw, hidden, heads)
    return ModelConfig(
        family="bloom",
        vocab_size=raw.count("vocab_size", default=250880),
        hidden_size=hidden,
        num_layers=raw.count("num_hidden_layers", "n_layer", default=2, maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        embed_size=hidden,
        max_positions=None,
        position="alibi",
        norm="layernorm",
        norm_eps=raw.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        embed_norm=True,
        residual_after_norm=raw.flag("apply_residual_connection_post_layernorm", False),
        tied_head=raw.flag("tie_word_embeddings", True),
        dtype=raw.text("dtype", raw.text("torch_dtype", None)),
        init_std=raw.number("initializer_range", 0.02),
        eos_token_ids=raw.tokens("eos_token_id"),
    )


BLOOM = Family(
    name="bloom",
    prefixes=("transformer.", ""),
    outer={
        "embed": "word_embeddings",
        "embed_norm": "word_embeddings_layernorm",
        "final_norm": "ln_f",
    },
    layer="h.{}.",
    inner={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attention.query_key_value",),
        "attention.out": ("self_attention.dense",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.up": ("mlp.dense_h_to_4h",),
        "mlp.down": ("mlp.dense_4h_to_h",),
    },
    read_config=read_config,
    interleaved_qkv=True,
    ignored=(".attn.masked_bias", ".attn.bias"),
)
