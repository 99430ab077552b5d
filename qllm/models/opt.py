"""OPT (Zhang et al. 2022): learned positions, LayerNorm, ReLU, biases, a tied head.

OPT-350m alone norms after attention and MLP, has no final norm, and embeds into 512 channels
which are projected to its 1024 and back.
"""

from __future__ import annotations

from qllm.config import ModelConfig
from qllm.models.family import MAX_LAYERS, Family, RawConfig, check_heads


def read_config(raw: RawConfig) -> ModelConfig:
    hidden = raw.count("hidden_size", default=768)
    heads = raw.count("num_attention_heads", default=12)
    check_heads(raw, hidden, heads)
    pre_norm = raw.flag("do_layer_norm_before", True)
    bias = raw.flag("enable_bias", True)
    return ModelConfig(
        family="opt",
        vocab_size=raw.count("vocab_size", default=50272),
        hidden_size=hidden,
        num_layers=raw.count("num_hidden_layers", default=12, maximum=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=raw.count("ffn_dim", default=3072),
        embed_size=raw.count("word_embed_proj_dim", default=hidden),
        max_positions=raw.count("max_position_embeddings", default=2048),
        position="learned",
        position_offset=2,
        norm="layernorm",
        norm_eps=1e-5,
        norm_affine=raw.flag("layer_norm_elementwise_affine", True),
        activation=raw.text("activation_function", "relu"),
        pre_norm=pre_norm,
        final_norm=pre_norm and not raw.flag("_remove_final_layer_norm", False),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        tied_head=raw.flag("tie_word_embeddings", True),
        dtype=raw.text("dtype", raw.text("torch_dtype", None)),
        init_std=raw.number("init_std", 0.02),
        eos_token_ids=raw.tokens("eos_token_id"),
    )


OPT = Family(
    name="opt",
    prefixes=("model.decoder.", "decoder.", ""),
    outer={
        "embed": "embed_tokens",
        "positions": "embed_positions",
        "project_in": "project_in",
        "project_out": "project_out",
        "final_norm": "final_layer_norm",
    },
    layer="layers.{}.",
    inner={
        "attention_norm": ("self_attn_layer_norm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.out_proj",),
        "mlp_norm": ("final_layer_norm",),
        "mlp.up": ("fc1",),
        "mlp.down": ("fc2",),
    },
    read_config=read_config,
)
