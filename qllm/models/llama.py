"""Llama (Touvron et al. 2023): RoPE, RMSNorm, SwiGLU, grouped key-value heads, no biases."""

from __future__ import annotations

from qllm.config import ModelConfig
from qllm.models.family import MAX_LAYERS, Family, RawConfig, check_groups, check_heads
from qllm.models.rope import reach, read_rope


def read_config(raw: RawConfig, *, partial: float | None = None) -> ModelConfig:
    """
    Args:
        partial: see `read_rope`.
    """
    hidden = raw.count("hidden_size", default=4096)
    heads = raw.count("num_attention_heads", default=32)
    kv_heads = raw.count("num_key_value_heads", default=heads)
    if raw.values.get("head_dim") is None:
        check_heads(raw, hidden, heads)
    check_groups(raw, heads, kv_heads)
    trained = raw.count("max_position_embeddings", default=2048)
    head_dim = raw.count("head_dim", default=hidden // heads)
    rope = read_rope(raw, trained, head_dim, partial=partial)
    attention_bias = raw.flag("attention_bias", False)
    return ModelConfig(
        family="llama",
        vocab_size=raw.count("vocab_size", default=32000),
        hidden_size=hidden,
        num_layers=raw.count("num_hidden_layers", default=32, maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=raw.count("intermediate_size", default=11008),
        embed_size=hidden,
        max_positions=reach(rope, trained),
        trained_positions=trained,
        position="rope",
        rope=rope,
        norm="rmsnorm",
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        activation=raw.text("hidden_act", "silu"),
        gated_mlp=True,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=raw.flag("mlp_bias", False),
        tied_head=raw.flag("tie_word_embeddings", False),
        dtype=raw.text("dtype", raw.text("torch_dtype", None)),
        init_std=raw.number("initializer_range", 0.02),
        eos_token_ids=raw.tokens("eos_token_id"),
    )


LLAMA = Family(
    name="llama",
    prefixes=("model.", ""),
    outer={"embed": "embed_tokens", "final_norm": "norm"},
    layer="layers.{}.",
    inner={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
    read_config=read_config,
    ignored=(".rotary_emb.inv_freq",),
)
