"""Settings that random configurations of several families share: counts, RoPE, Llama's sizes."""

from __future__ import annotations

from hypothesis import strategies as st

from qllm.models.activations import ACTIVATIONS, SAME_ACTIVATION
from qllm.models.rope import ROPE_KINDS

LONGEST_PROMPT, MAX_NEW_TOKENS = 20, 8
WINDOW = LONGEST_PROMPT + MAX_NEW_TOKENS

layer_counts = st.integers(1, 3)
vocab_sizes = st.integers(5, 120)
activations = st.sampled_from([*ACTIVATIONS.keys() - {"gelu_tanh"}, *SAME_ACTIVATION])
flags = st.booleans()
# Shorter than many of the prompts. With 1, transformers' cache forgets to forget.
windows = st.integers(2, 24)
kinds = st.sampled_from(["full_attention", "sliding_attention"])


@st.composite
def rope_settings(draw, head_dim: int, partial: float | None = None) -> tuple[dict, int]:
    """rope_parameters and max_position_embeddings that have room for the test's prompts.

    Args:
        partial: the share of a head that is turned, in a family that has it.
    """
    kind = draw(st.sampled_from(ROPE_KINDS))
    turned = head_dim if partial is None else int(head_dim * partial)
    if turned < 3 or (kind == "yarn" and turned % 2):
        kind, partial, turned = "default", 1.0, head_dim
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from([100.0, 10000.0, 500000.0]))}
    if partial is not None:
        rope["partial_rotary_factor"] = partial
    if kind == "default":
        return rope, draw(st.integers(WINDOW, 100))
    # The window is `trained` times the factor: prompts go past what the model was trained for.
    trained = draw(st.integers(4, 40))
    rope["factor"] = max(draw(st.floats(1.0, 8.0)), WINDOW / trained + 1e-3)
    if kind == "proportional":
        rope["partial_rotary_factor"] = draw(st.floats(0.1, 1.0))
    if kind not in ("llama3", "yarn", "longrope"):
        return rope, trained
    rope["original_max_position_embeddings"] = draw(st.integers(4, WINDOW - 1))
    if kind == "llama3":
        rope["low_freq_factor"] = draw(st.floats(0.5, 2.0))
        rope["high_freq_factor"] = rope["low_freq_factor"] + draw(st.floats(0.5, 4.0))
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            pairs = -(-turned // 2)
            factors = st.lists(st.floats(0.5, 8.0), min_size=pairs, max_size=pairs)
            rope[name] = draw(factors)
    return rope, WINDOW


@st.composite
def llama_sizes(draw) -> dict:
    """Settings that Llama has, and all that come from it."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    # Not hidden_size / heads, and 4 or more: dynamic scaling divides by head_dim - 2.
    head_dim = 2 * draw(st.integers(2, 8))
    rope, trained = draw(rope_settings(head_dim))
    return {
        "vocab_size": draw(vocab_sizes),
        "hidden_size": heads * draw(st.integers(-(-6 // heads), 8)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": draw(layer_counts),
        "intermediate_size": draw(st.integers(1, 70)),
        "max_position_embeddings": trained,
        "rope_parameters": rope,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "hidden_act": draw(st.one_of(st.just("silu"), activations)),
        "tie_word_embeddings": draw(flags),
    }
