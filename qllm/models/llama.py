"""Llama (Touvron et al. 2023): RoPE, RMSNorm, SwiGLU, grouped key-value heads, no biases."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qllm.config import ModelConfig, RopeConfig
from qllm.errors import UserError
from qllm.models.family import MOST_LAYERS, MOST_OF_ANYTHING, Family, RawConfig, check_heads

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
# YaRN's ramp goes from pairs that turn so often to those that turn so often.
BETA_FAST, BETA_SLOW = 32, 1
PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


def read_config(raw: RawConfig) -> ModelConfig:
    hidden = raw.count("hidden_size", default=4096)
    heads = raw.count("num_attention_heads", default=32)
    kv_heads = raw.count("num_key_value_heads", default=heads)
    if raw.values.get("head_dim") is None:
        check_heads(raw, hidden, heads)
    if heads % kv_heads:
        raise UserError(f"{raw.where}: {heads} heads cannot share {kv_heads} key-value heads")
    trained = raw.count("max_position_embeddings", default=2048)
    head_dim = raw.count("head_dim", default=hidden // heads)
    rope = _read_rope(raw, trained, head_dim)
    attention_bias = raw.flag("attention_bias", False)
    window = trained
    if rope.kind in ("linear", "dynamic", "proportional"):
        window = trained * rope.factor
    elif rope.kind == "yarn":
        window = max(trained, rope.original_max_positions * rope.factor)
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
        max_positions=int(min(window, MOST_OF_ANYTHING)),
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
    """RoPE settings, with transformers' precedence where a file has old and new ones.

    transformers 5 writes `rope_parameters`; a `rope_scaling` of version 4 wins over it where it is
    there, and a top-level `rope_theta` or `partial_rotary_factor` counts where the object has none.
    """
    name = "rope_scaling" if raw.values.get("rope_scaling") else "rope_parameters"
    value = raw.values.get(name) or {}
    if not isinstance(value, Mapping):
        raise raw.error(name, value, "an object")
    above = {key: raw.values[key] for key in ("rope_theta", PARTIAL) if key in raw.values}
    rope = RawConfig({**above, **value}, f"{raw.where}: {name}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise rope.error("rope_type", kind, f"one of {', '.join(ROPE_KINDS)}")
    if head_dim % 2:
        raise UserError(f"{raw.where}: RoPE needs an even head_dim, not {head_dim}")
    theta = rope.number("rope_theta", 10000.0)
    if kind == "default":  # as in transformers, whatever the partial_rotary_factor
        return RopeConfig(theta)
    partial = rope.number(PARTIAL, 1.0)
    if kind == "proportional":
        if partial > 1:
            raise rope.error(PARTIAL, partial, "1 or less")
        pairs = int(partial * head_dim // 2)
        return RopeConfig(theta, kind, rope.number("factor", 1.0), turned_pairs=pairs)
    if int(min(head_dim * partial, MOST_OF_ANYTHING)) != head_dim:
        raise rope.error(PARTIAL, partial, f"1 with rope_type {kind!r}, as Llama has it")
    if kind in ("linear", "dynamic"):
        if kind == "dynamic" and head_dim < 4:
            raise UserError(
                f"{raw.where}: dynamic RoPE needs a head_dim of 4 or more, not {head_dim}"
            )
        return RopeConfig(theta, kind, rope.number("factor"))
    # Of these three, the length may stand outside, and wins there.
    outside = raw.values.get(ORIGINAL) is not None
    original = (raw if outside else rope).count(ORIGINAL, default=trained)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return RopeConfig(theta, kind, rope.number("factor"), low, high, original)
    factor = rope.number("factor", trained / original)
    if kind == "longrope":
        return _longrope(rope, theta, factor, original, head_dim // 2)
    return _yarn(rope, theta, factor, original)


def _yarn(rope: RawConfig, theta: float, factor: float, original: int) -> RopeConfig:
    if "factor" not in rope.values:
        raise rope.error("factor", None, "a positive number")
    if theta == 1:
        raise rope.error("rope_theta", theta, "another number than 1 with yarn")
    mscale, mscale_all = rope.values.get("mscale"), rope.values.get("mscale_all_dim")
    scale = math.log(max(factor, 1.0)) / 10
    attention = scale + 1
    if mscale and mscale_all:
        mscale, mscale_all = rope.number("mscale"), rope.number("mscale_all_dim")
        attention = (mscale * scale + 1) / (mscale_all * scale + 1)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", attention),
        beta_fast=rope.number("beta_fast", BETA_FAST),
        beta_slow=rope.number("beta_slow", BETA_SLOW),
        # transformers takes a null for false here, and an entry that is not there for true.
        truncate="truncate" not in rope.values or rope.flag("truncate", False),
    )


def _longrope(
    rope: RawConfig, theta: float, factor: float, original: int, pairs: int
) -> RopeConfig:
    attention = 1.0
    if factor > 1 and rope.values.get("attention_factor") is None:
        if original == 1:
            raise rope.error(ORIGINAL, original, "more than 1")
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta,
        "longrope",
        factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", attention),
        short_factor=rope.numbers("short_factor", pairs),
        long_factor=rope.numbers("long_factor", pairs),
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
