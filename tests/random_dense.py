"""Random configurations of families that come from Llama, with heads or norms of their own."""

from __future__ import annotations

from hypothesis import strategies as st
from random_sizes import flags, kinds, llama_sizes, rope_settings, windows
from transformers import Cohere2Config, CohereConfig, Glm4Config, GlmConfig, PretrainedConfig


@st.composite
def glm_configs(draw, kind: type[PretrainedConfig]) -> PretrainedConfig:
    sizes = draw(llama_sizes())
    rope, trained = draw(rope_settings(sizes["head_dim"], partial=draw(st.floats(0.3, 1.0))))
    more = {"max_position_embeddings": trained, "rope_parameters": rope, "pad_token_id": None}
    # Norms behind an MLP of few channels, which may be next to 0, have no digits, as Gemma's.
    more |= {"intermediate_size": draw(st.integers(16, 70)), "attention_bias": draw(flags)}
    return kind(**sizes | more)


@st.composite
def cohere_configs(draw) -> CohereConfig:
    sizes = draw(llama_sizes())
    more = {"attention_bias": draw(flags), "logit_scale": draw(st.floats(0.05, 2.0))}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    return CohereConfig(**sizes, layer_norm_eps=sizes.pop("rms_norm_eps"), **more, **ids)


@st.composite
def cohere2_configs(draw) -> Cohere2Config:
    sizes = draw(llama_sizes())
    count = sizes["num_hidden_layers"]
    types = draw(st.one_of(st.none(), st.lists(kinds, min_size=count, max_size=count)))
    more = {"attention_bias": draw(flags), "logit_scale": draw(st.floats(0.05, 2.0))}
    more |= {"sliding_window": draw(windows), "layer_types": types}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    return Cohere2Config(**sizes, layer_norm_eps=sizes.pop("rms_norm_eps"), **more, **ids)


# As `random_configs.CONFIGS`, where these are among others.
DENSE: dict[str, tuple[st.SearchStrategy[PretrainedConfig], int]] = {
    "glm": (glm_configs(GlmConfig), 4),
    "glm4": (glm_configs(Glm4Config), 4),
    "cohere": (cohere_configs(), 4),
    "cohere2": (cohere2_configs(), 5),
}
