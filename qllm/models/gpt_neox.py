"""GPT-NeoX (Black et al. 2022) and Pythia: RoPE in a part of a head, attention beside the MLP."""

from __future__ import annotations

from qllm.config import ModelConfig
from qllm.models.family import MAX_LAYERS, Family, RawConfig, check_heads
from qllm.models.rope import PARTIAL, reach, read_rope


def read_config(raw: RawConfig) -> ModelConfig:
    hidden = raw.count("hidden_size", default=6144)
    heads = raw.count("num_attention_heads", default=64)
    check_heads(raw, hidden, heads)
    trained = raw.count("max_position_embeddings", default=2048)
    # Settings of RoPE that stand outside have names of their own here.
    names = {"rope_theta": "rotary_emb_base", PARTIAL: "rotary_pct"}
    values = {key: value for key, value in raw.values.items() if key not in names}
    values |= {ours: values[name] for ours, name in names.items() if name in values}
    rope = read_rope(RawConfig(values, raw.where), trained, hidden // heads, partial=0.25)
    bias = raw.flag("attention_bias", True)
    return ModelConfig(
        family="gpt_neox",
        vocab_size=raw.count("vocab_size", default=50432),
        hidden_size=hidden,
        num_layers=raw.count("num_hidden_layers", default=44, maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=raw.count("intermediate_size", default=24576),
        embed_size=hidden,
        max_positions=reach(rope, trained),
        trained_positions=trained,
        position="rope",
        rope=rope,
        norm="layernorm",
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        activation=raw.text("hidden_act", "gelu"),
        parallel_blocks=raw.flag("use_parallel_residual", True),
        attention_bias=bias,
        output_bias=bias,
        tied_head=raw.flag("tie_word_embeddings", False),
        dtype=raw.text("dtype", raw.text("torch_dtype", None)),
        init_std=raw.number("initializer_range", 0.02),
        eos_token_ids=raw.tokens("eos_token_id"),
    )


GPT_NEOX = Family(
    name="gpt_neox",
    prefixes=("gpt_neox.", ""),
    outer={"embed": "embed_in", "final_norm": "final_layer_norm"},
    head="embed_out",
    layer="layers.{}.",
    inner={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("attention.query_key_value",),
        "attention.out": ("attention.dense",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.up": ("mlp.dense_h_to_4h",),
        "mlp.down": ("mlp.dense_4h_to_h",),
    },
    read_config=read_config,
    interleaved_qkv=True,
    ignored=(".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq"),
)
