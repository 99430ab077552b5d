"""Random configurations of families some of whose layers have a state in the place of attention."""

from __future__ import annotations

from hypothesis import strategies as st
from random_sizes import flags, llama_sizes, rope_settings
from transformers import PretrainedConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

KINDS = st.sampled_from(["full_attention", "linear_attention"])


@st.composite
def hybrid_sizes(draw) -> dict:
    """Settings that Qwen3.5 and Qwen3-Next share."""
    sizes = draw(llama_sizes())
    rope, trained = draw(rope_settings(sizes["head_dim"], draw(st.sampled_from([0.25, 0.5, 1.0]))))
    count, key_heads = sizes["num_hidden_layers"], draw(st.integers(1, 3))
    kinds = draw(st.lists(KINDS, min_size=count, max_size=count))
    kinds[draw(st.integers(0, count - 1))] = "full_attention"  # without one transformers fails
    which = {"layer_types": kinds} if draw(flags) else {}
    if not which:
        which = {"full_attention_interval": draw(st.integers(1, count))}
    return (
        sizes
        | which
        | {
            "hidden_act": "silu",  # of the convolutions, too
            "rope_parameters": rope,
            "max_position_embeddings": trained,
            "attention_bias": draw(flags),
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": key_heads * draw(st.integers(1, 3)),
            "linear_key_head_dim": draw(st.integers(1, 20)),
            "linear_value_head_dim": draw(st.integers(1, 40)),
            "linear_conv_kernel_dim": draw(st.integers(2, 5)),
            "pad_token_id": None,
        }
    )


@st.composite
def hybrid_experts(draw) -> dict:
    """The same with a mixture of experts in the place of MLPs."""
    count = draw(st.integers(1, 6))
    return draw(hybrid_sizes()) | {
        "num_experts": count,
        "num_experts_per_tok": draw(st.integers(1, count)),
        "moe_intermediate_size": draw(st.integers(1, 40)),
        "shared_expert_intermediate_size": draw(st.integers(1, 40)),
    }


@st.composite
def qwen3_next_configs(draw) -> Qwen3NextConfig:
    return Qwen3NextConfig(
        **draw(hybrid_experts()),
        norm_topk_prob=draw(flags),
        decoder_sparse_step=draw(st.integers(1, 2)),
        mlp_only_layers=draw(st.sampled_from([None, [0], [1]])),
    )


HYBRIDS: dict[str, tuple[st.SearchStrategy[PretrainedConfig], int]] = {
    "qwen3_5_text": (st.builds(lambda each: Qwen3_5TextConfig(**each), hybrid_sizes()), 8),
    "qwen3_5_moe_text": (st.builds(lambda each: Qwen3_5MoeTextConfig(**each), hybrid_experts()), 4),
    "qwen3_next": (qwen3_next_configs(), 6),
}
