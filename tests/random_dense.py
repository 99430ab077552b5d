"""Random configurations of families that come from Llama, with heads or norms of their own."""

from __future__ import annotations

from hypothesis import strategies as st
from random_sizes import flags, llama_sizes, rope_settings
from transformers import Glm4Config, GlmConfig, PretrainedConfig


@st.composite
def glm_configs(draw, kind: type[PretrainedConfig]) -> PretrainedConfig:
    sizes = draw(llama_sizes())
    rope, trained = draw(rope_settings(sizes["head_dim"], partial=draw(st.floats(0.3, 1.0))))
    more = {"max_position_embeddings": trained, "rope_parameters": rope, "pad_token_id": None}
    # Norms behind an MLP of few channels, which may be next to 0, have no digits, as Gemma's.
    more |= {"intermediate_size": draw(st.integers(16, 70)), "attention_bias": draw(flags)}
    return kind(**sizes | more)


# As `random_configs.CONFIGS`, where these are among others.
DENSE: dict[str, tuple[st.SearchStrategy[PretrainedConfig], int]] = {
    "glm": (glm_configs(GlmConfig), 4),
    "glm4": (glm_configs(Glm4Config), 4),
}
