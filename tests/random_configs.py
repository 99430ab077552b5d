"""Random configurations of every family, and of the prompts that such a model is given."""

from __future__ import annotations

from hypothesis import strategies as st
from random_dense import DENSE
from random_hybrids import HYBRIDS
from random_sizes import (
    LONGEST_PROMPT,
    WINDOW,
    activations,
    flags,
    kinds,
    layer_counts,
    llama_sizes,
    rope_settings,
    vocab_sizes,
    windows,
)
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)


@st.composite
def opt_configs(draw) -> OPTConfig:
    heads = draw(st.integers(1, 6))
    hidden = heads * draw(st.integers(-(-6 // heads), 12))
    return OPTConfig(
        vocab_size=draw(vocab_sizes),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=draw(layer_counts),
        ffn_dim=draw(st.integers(1, 70)),
        max_position_embeddings=draw(st.integers(WINDOW, 50)),
        word_embed_proj_dim=draw(st.one_of(st.just(hidden), st.integers(6, 40))),
        do_layer_norm_before=draw(flags),
        _remove_final_layer_norm=draw(flags),
        enable_bias=draw(flags),
        layer_norm_elementwise_affine=draw(flags),
        activation_function=draw(activations),
        tie_word_embeddings=draw(flags),
    )


@st.composite
def bloom_configs(draw) -> BloomConfig:
    heads = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 20]))
    return BloomConfig(
        vocab_size=draw(vocab_sizes),
        hidden_size=heads * draw(st.integers(-(-6 // heads), 9)),
        n_head=heads,
        n_layer=draw(layer_counts),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
        apply_residual_connection_post_layernorm=draw(flags),
        tie_word_embeddings=draw(flags),
    )


@st.composite
def llama_configs(draw) -> LlamaConfig:
    biases = {"attention_bias": draw(flags), "mlp_bias": draw(flags)}
    return LlamaConfig(**draw(llama_sizes()), **biases)


@st.composite
def mistral_configs(draw) -> MistralConfig:
    window = draw(st.one_of(st.none(), windows))
    return MistralConfig(**draw(llama_sizes()), sliding_window=window)


@st.composite
def ministral3_configs(draw) -> Ministral3Config:
    sizes = draw(llama_sizes())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": draw(st.floats(8.0, 16.0))}
    # Prompts go on beyond it, where queries grow.
    rope["original_max_position_embeddings"] = draw(st.integers(4, 12))
    rope["llama_4_scaling_beta"] = draw(st.sampled_from([0.0, 0.1, 0.5]))
    for name in ("mscale", "mscale_all_dim") if draw(flags) else ():
        rope[name] = draw(st.floats(0.5, 1.5))
    sizes |= {"rope_parameters": rope, "max_position_embeddings": WINDOW, "pad_token_id": None}
    return Ministral3Config(**sizes, sliding_window=draw(st.one_of(st.none(), windows)))


@st.composite
def qwen_windows(draw) -> dict:
    """Which layers of Qwen2 and Qwen3 have a window."""
    return {
        "use_sliding_window": draw(flags),
        "sliding_window": draw(windows),
        "max_window_layers": draw(st.integers(0, 2)),
    }


@st.composite
def qwen2_configs(draw) -> Qwen2Config:
    return Qwen2Config(**draw(llama_sizes()), **draw(qwen_windows()))


@st.composite
def qwen3_configs(draw) -> Qwen3Config:
    more = {**draw(qwen_windows()), "attention_bias": draw(flags)}
    return Qwen3Config(**draw(llama_sizes()), **more)


@st.composite
def gemma_sizes(draw) -> dict:
    """Settings that Gemma 2 and 3 share."""
    sizes = draw(llama_sizes())
    count = sizes["num_hidden_layers"]
    return {
        **sizes,
        "hidden_activation": sizes.pop("hidden_act"),
        # The norm behind an MLP of one channel or two, which may be next to 0, has no digits.
        "intermediate_size": draw(st.integers(16, 70)),
        "attention_bias": draw(flags),
        "sliding_window": draw(windows),
        "layer_types": draw(st.one_of(st.none(), st.lists(kinds, min_size=count, max_size=count))),
        "query_pre_attn_scalar": draw(st.integers(1, 300)),
        "attn_logit_softcapping": draw(st.one_of(st.none(), st.floats(1.0, 50.0))),
        "final_logit_softcapping": draw(st.one_of(st.none(), st.floats(1.0, 50.0))),
    }


@st.composite
def gemma2_configs(draw) -> Gemma2Config:
    return Gemma2Config(**draw(gemma_sizes()))


@st.composite
def gemma3_text_configs(draw) -> Gemma3TextConfig:
    sizes = draw(gemma_sizes())
    rope = sizes["rope_parameters"]
    local = {"rope_type": "default", "rope_theta": 100.0}
    sizes["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return Gemma3TextConfig(**sizes)


@st.composite
def gemma4_text_configs(draw) -> Gemma4TextConfig:
    sizes = draw(llama_sizes())
    count, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    global_dim = 2 * draw(st.integers(2, 8))
    share = {"partial_rotary_factor": draw(st.floats(0.1, 1.0))}
    ropes = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, **share},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    layers = draw(st.one_of(st.none(), st.lists(kinds, min_size=count, max_size=count)))
    shared = draw(st.integers(0, count - 1))
    if shared:  # both kinds are in front of those that share
        count = sizes["num_hidden_layers"] = shared + 2
        layers = ["full_attention", *draw(st.lists(kinds, min_size=count - 1, max_size=count - 1))]
        layers[1 : count - shared] = ["sliding_attention"] * (count - shared - 1)
    # transformers knows no sharing without inputs of layers.
    inputs = draw(st.sampled_from([4, 6] if shared else [0, 4, 6]))
    experts = draw(flags)
    count = draw(st.integers(1, 9))
    return Gemma4TextConfig(
        **sizes
        | {
            "hidden_activation": sizes.pop("hidden_act"),
            "intermediate_size": draw(st.integers(16, 70)),
            "max_position_embeddings": WINDOW,
            "rope_parameters": ropes,
        },
        attention_bias=draw(flags),
        sliding_window=draw(windows),
        layer_types=layers,
        final_logit_softcapping=draw(st.one_of(st.none(), st.floats(1.0, 50.0))),
        global_head_dim=global_dim,
        attention_k_eq_v=draw(flags),
        num_global_key_value_heads=draw(
            st.sampled_from([None, *(n for n in range(1, heads + 1) if heads % n == 0)])
        ),
        use_bidirectional_attention=draw(st.sampled_from([None, "vision"])),
        hidden_size_per_layer_input=inputs,
        vocab_size_per_layer_input=sizes["vocab_size"] + draw(st.integers(0, 5)),
        num_kv_shared_layers=shared,
        use_double_wide_mlp=not experts and draw(flags),
        enable_moe_block=experts,
        num_experts=count,
        top_k_experts=draw(st.integers(1, min(count, 4))),
        moe_intermediate_size=draw(st.integers(16, 40)),
    )


@st.composite
def phi3_configs(draw) -> Phi3Config:
    sizes = draw(llama_sizes()) | {"max_position_embeddings": WINDOW}
    # transformers looks at heads of this size when it reads the file.
    head_dim = sizes["head_dim"] = 2 * draw(st.integers(2, 4))
    sizes["hidden_size"] = head_dim * sizes["num_attention_heads"]
    pairs = draw(st.one_of(st.just(head_dim // 2), st.integers(1, head_dim // 2)))
    partial = 2 * pairs / head_dim
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}
    if draw(flags):
        factors = st.lists(st.floats(0.5, 8.0), min_size=pairs, max_size=pairs)
        rope |= {"rope_type": "longrope", "short_factor": draw(factors)}
        rope["long_factor"] = draw(factors)
        # Not in between: transformers reads a text anew that grows beyond this length.
        sizes["original_max_position_embeddings"] = draw(st.sampled_from([1, WINDOW]))
        rope["attention_factor"] = draw(st.floats(1.0, 1.2))
    return Phi3Config(**sizes | {"rope_parameters": rope, "pad_token_id": None})


@st.composite
def gpt_neox_configs(draw) -> GPTNeoXConfig:
    heads, head_dim = draw(st.integers(1, 6)), 2 * draw(st.integers(2, 8))
    rope, trained = draw(rope_settings(head_dim, partial=draw(st.floats(0.1, 1.0))))
    return GPTNeoXConfig(
        vocab_size=draw(vocab_sizes),
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_hidden_layers=draw(layer_counts),
        intermediate_size=draw(st.integers(1, 70)),
        max_position_embeddings=trained,
        rope_parameters=rope,
        hidden_act=draw(activations),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-2])),
        use_parallel_residual=draw(flags),
        attention_bias=draw(flags),
        tie_word_embeddings=draw(flags),
    )


@st.composite
def gpt2_configs(draw) -> GPT2Config:
    heads = draw(st.integers(1, 6))
    return GPT2Config(
        vocab_size=draw(vocab_sizes),
        n_embd=heads * draw(st.integers(-(-6 // heads), 12)),
        n_head=heads,
        n_layer=draw(layer_counts),
        n_inner=draw(st.one_of(st.none(), st.integers(1, 70))),
        n_positions=draw(st.integers(WINDOW, 50)),
        activation_function=draw(activations),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
        tie_word_embeddings=draw(flags),
        scale_attn_weights=draw(flags),
        scale_attn_by_inverse_layer_idx=draw(flags),
    )


@st.composite
def starcoder2_configs(draw) -> Starcoder2Config:
    sizes = draw(llama_sizes())
    more = {"use_bias": draw(flags), "sliding_window": draw(st.one_of(st.none(), windows))}
    return Starcoder2Config(**sizes, **more, norm_epsilon=sizes.pop("rms_norm_eps"))


@st.composite
def granite_factors(draw) -> dict:
    """What Granite's models share."""
    return {
        "embedding_multiplier": draw(st.one_of(st.integers(1, 12), st.floats(0.1, 12.0))),
        "attention_multiplier": draw(st.floats(0.01, 1.0)),
        "residual_multiplier": draw(st.one_of(st.just(1.0), st.floats(0.1, 2.0))),
        "logits_scaling": draw(st.one_of(st.just(1.0), st.floats(0.1, 16.0))),
    }


@st.composite
def granite_configs(draw) -> GraniteConfig:
    biases = {"attention_bias": draw(flags), "mlp_bias": draw(flags)}
    return GraniteConfig(**draw(llama_sizes()), **biases, **draw(granite_factors()))


@st.composite
def smollm3_configs(draw) -> SmolLM3Config:
    sizes = draw(llama_sizes())
    count = sizes["num_hidden_layers"]
    rotated = st.lists(st.integers(0, 1), min_size=count, max_size=count)
    return SmolLM3Config(
        **sizes,
        attention_bias=draw(flags),
        mlp_bias=draw(flags),
        use_sliding_window=draw(flags),
        sliding_window=draw(windows),
        no_rope_layers=draw(st.one_of(st.none(), rotated)),
        no_rope_layer_interval=draw(st.integers(1, 4)),
        layer_types=draw(st.one_of(st.none(), st.lists(kinds, min_size=count, max_size=count))),
        pad_token_id=None,
    )


@st.composite
def olmo2_configs(draw) -> Olmo2Config:
    # Norms behind an MLP of few channels, which may be next to 0, have no digits, as Gemma's.
    more = {"intermediate_size": draw(st.integers(16, 70)), "pad_token_id": None}
    return Olmo2Config(**draw(llama_sizes()) | more, attention_bias=draw(flags))


@st.composite
def olmo3_configs(draw) -> Olmo3Config:
    sizes = draw(llama_sizes())
    count = sizes["num_hidden_layers"]
    local = {"rope_type": "default", "rope_theta": 100.0}
    ropes = {"full_attention": sizes["rope_parameters"], "sliding_attention": local}
    more = {"intermediate_size": draw(st.integers(16, 70)), "pad_token_id": None}
    return Olmo3Config(
        **sizes | more | {"rope_parameters": ropes},
        attention_bias=draw(flags),
        sliding_window=draw(windows),
        layer_types=draw(st.one_of(st.none(), st.lists(kinds, min_size=count, max_size=count))),
    )


@st.composite
def expert_sizes(draw, count: str) -> dict:
    """Settings of Llama, and how many experts there are and a token takes.

    Args:
        count: what a family calls the number of experts.
    """
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(experts, 4)))
    return {**draw(llama_sizes()), count: experts, "num_experts_per_tok": top_k}


@st.composite
def mixtral_configs(draw) -> MixtralConfig:
    window = draw(st.one_of(st.none(), windows))
    return MixtralConfig(**draw(expert_sizes("num_local_experts")), sliding_window=window)


@st.composite
def qwen_moe_settings(draw) -> dict:
    """What Qwen's mixtures of experts share."""
    return {
        "moe_intermediate_size": draw(st.integers(1, 40)),
        "norm_topk_prob": draw(flags),
        "decoder_sparse_step": draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 2), max_size=1)),
    }


@st.composite
def qwen2_moe_configs(draw) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        **draw(expert_sizes("num_experts")),
        **draw(qwen_moe_settings()),
        **draw(qwen_windows()),
        shared_expert_intermediate_size=draw(st.integers(1, 40)),
        qkv_bias=draw(flags),
    )


@st.composite
def qwen3_moe_configs(draw) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **draw(expert_sizes("num_experts")),
        **draw(qwen_moe_settings()),
        use_sliding_window=draw(flags),
        sliding_window=draw(windows),
        attention_bias=draw(flags),
    )


@st.composite
def olmoe_configs(draw) -> OlmoeConfig:
    sizes = draw(expert_sizes("num_experts"))
    # Its norms take heads of no other size.
    sizes["hidden_size"] = sizes["num_attention_heads"] * sizes.pop("head_dim")
    return OlmoeConfig(**sizes, norm_topk_prob=draw(flags), attention_bias=draw(flags))


@st.composite
def granitemoe_configs(draw) -> GraniteMoeConfig:
    sizes = draw(expert_sizes("num_local_experts"))
    return GraniteMoeConfig(**sizes, **draw(granite_factors()), attention_bias=draw(flags))


@st.composite
def gpt_oss_configs(draw) -> GptOssConfig:
    sizes = draw(expert_sizes("num_local_experts"))
    count = sizes["num_hidden_layers"]
    return GptOssConfig(
        **sizes,
        attention_bias=draw(flags),
        sliding_window=draw(windows),
        layer_types=draw(st.one_of(st.none(), st.lists(kinds, min_size=count, max_size=count))),
    )


# Of every family, and how many are drawn: a family that comes from another adds little.
CONFIGS: dict[str, tuple[st.SearchStrategy[PretrainedConfig], int]] = {
    "opt": (opt_configs(), 14),
    "bloom": (bloom_configs(), 14),
    "llama": (llama_configs(), 16),
    "mistral": (mistral_configs(), 5),
    "ministral3": (ministral3_configs(), 5),
    "qwen2": (qwen2_configs(), 4),
    "gemma2": (gemma2_configs(), 8),
    "gemma3_text": (gemma3_text_configs(), 9),
    "gemma4_text": (gemma4_text_configs(), 9),
    "qwen3": (qwen3_configs(), 5),
    "phi3": (phi3_configs(), 5),
    "gpt_neox": (gpt_neox_configs(), 9),
    "gpt2": (gpt2_configs(), 6),
    "starcoder2": (starcoder2_configs(), 4),
    "granite": (granite_configs(), 5),
    "smollm3": (smollm3_configs(), 6),
    "olmo2": (olmo2_configs(), 5),
    "olmo3": (olmo3_configs(), 6),
    **DENSE,
    "mixtral": (mixtral_configs(), 5),
    "qwen2_moe": (qwen2_moe_configs(), 6),
    "qwen3_moe": (qwen3_moe_configs(), 6),
    "olmoe": (olmoe_configs(), 5),
    "granitemoe": (granitemoe_configs(), 4),
    "gpt_oss": (gpt_oss_configs(), 6),
    **HYBRIDS,
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss")
batches = st.lists(st.integers(1, LONGEST_PROMPT), min_size=1, max_size=5)
seeds = st.integers(0, 2**20)
