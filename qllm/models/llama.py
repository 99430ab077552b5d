"""Llama (Touvron et al. 2023): RoPE, RMSNorm, SwiGLU, grouped key-value heads, no biases."""

from __future__ import annotations

from collections.abc import Mapping

from qllm.config import ModelConfig, RopeConfig
from qllm.errors import UserError
from qllm.models.family import MOST_LAYERS, MOST_OF_ANYTHING, Family, RawConfig, check_heads

ROPE_KINDS = ("default", "linear", "dynamic", "llama3")


def read_config(raw: RawConfig) -> ModelConfig:
    hidden = raw.count("hidden_size", default=4096)
    heads = raw.count("num_attention_heads", default=32)
    kv_heads = raw.count("num_key_value_heads", default=heads)
    check_heads(raw, hidden, heads)
    if heads % kv_heads:
        raise UserError(f"{raw.where}: {heads} heads cannot share {kv_heads} key-value heads")
    trained = raw.count("max_position_embeddings", default=2048)
    head_dim = raw.count("head_dim", default=hidden // heads)
    rope = _read_rope(raw, trained, head_dim)
    attention_bias = raw.flag("attention_bias", False)
    stretch = rope.factor if rope.kind in ("linear", "dynamic") else 1.0
    return ModelConfig(
        family="llama",
        vocab_size=raw.count("vocab_size", default=32000),
        hidden_size=hidden,
        num_layers=raw.count("num_hidden_layers", default=32, most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=raw.count("intermediate_size", default=11008),
        embed_size=hidden,
        max_positions=int(min(trained * stretch, MOST_OF_ANYTHING)),
        trained_positions=trained,
        position="rope",
        rope=rope,
        norm="rmsnorm",
        norm_eps=raw.number("rms_norm_eps", 1e-6),
        activation=raw.text("hidden_act", "silu"),
        gated_mlp=True,
        attention_bias=attention_bias,
        mlp_bias=raw.flag("mlp_bias", False),
        tied_head=raw.flag("tie_word_embeddings", False),
        dtype=raw.text("dtype", raw.text("torch_dtype", None)),
        init_std=raw.number("initializer_range", 0.02),
        eos_token_ids=raw.tokens("eos_token_id"),
    )


def _read_rope(raw: RawConfig, trained: int, head_dim: int) -> RopeConfig:
    """RoPE settings: transformers 5 writes `rope_parameters`, 4 `rope_theta` and `rope_scaling`."""
    value = raw.values.get("rope_parameters") or raw.values.get("rope_scaling") or {}
    if not isinstance(value, Mapping):
        raise raw.error("rope_scaling", value, "an object")
    rope = RawConfig(value, f"{raw.where}: rope_scaling")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise rope.error("rope_type", kind, f"one of {', '.join(ROPE_KINDS)}")
    if head_dim % 2:
        raise UserError(f"{raw.where}: RoPE needs an even head_dim, not {head_dim}")
    if rope.values.get("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error(
            "partial_rotary_factor", rope.values["partial_rotary_factor"], "1, as Llama has it"
        )
    theta = rope.number("rope_theta", raw.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta)
    factor = rope.number("factor")
    if kind == "dynamic" and head_dim < 4:
        raise UserError(f"{raw.where}: dynamic RoPE needs a head_dim of 4 or more, not {head_dim}")
    if kind != "llama3":
        return RopeConfig(theta, kind, factor)
    return RopeConfig(
        theta,
        kind,
        factor,
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.count("original_max_position_embeddings", default=trained),
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
