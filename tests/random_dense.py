"""Random configurations of families that come from Llama, with heads or norms of their own."""

from __future__ import annotations

from hypothesis import strategies as st
from random_sizes import flags, kinds, llama_sizes, rope_settings, windows
from transformers import (
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    OlmoConfig,
    PhiConfig,
    PretrainedConfig,
    SeedOssConfig,
    StableLmConfig,
)


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


@st.composite
def exaone4_configs(draw) -> Exaone4Config:
    sizes = draw(llama_sizes()) | {"intermediate_size": draw(st.integers(16, 70))}
    count, window = sizes["num_hidden_layers"], draw(st.one_of(st.none(), windows))
    types = st.one_of(st.none(), st.lists(kinds, min_size=count, max_size=count))
    types = draw(types) if window else ["full_attention"] * count
    pattern = draw(st.integers(1, 4))
    more = {"sliding_window": window, "sliding_window_pattern": pattern, "layer_types": types}
    return Exaone4Config(**sizes, **more)


@st.composite
def ernie4_5_configs(draw) -> Ernie4_5Config:
    return Ernie4_5Config(**draw(llama_sizes()), use_bias=draw(flags), pad_token_id=None)


@st.composite
def gemma_configs(draw) -> GemmaConfig:
    return GemmaConfig(**draw(llama_sizes()), attention_bias=draw(flags))


@st.composite
def stablelm_configs(draw) -> StableLmConfig:
    sizes = draw(llama_sizes())
    head_dim = sizes.pop("head_dim")
    sizes["hidden_size"] = head_dim * sizes["num_attention_heads"]
    share = 2 * draw(st.integers(1, head_dim // 2)) / head_dim  # of whole pairs
    rope, trained = draw(rope_settings(head_dim, partial=share))
    sizes |= {"max_position_embeddings": trained, "rope_parameters": rope}
    more = {"use_qkv_bias": draw(flags), "use_parallel_residual": draw(flags)}
    return StableLmConfig(**sizes, layer_norm_eps=sizes.pop("rms_norm_eps"), **more)


@st.composite
def phi_configs(draw) -> PhiConfig:
    sizes = draw(llama_sizes()) | {"tie_word_embeddings": False}
    head_dim = sizes["head_dim"]
    share = 2 * draw(st.integers(1, head_dim // 2)) / head_dim  # of whole pairs
    rope, trained = draw(rope_settings(head_dim, partial=share))
    sizes |= {"max_position_embeddings": trained, "rope_parameters": rope}
    return PhiConfig(**sizes, layer_norm_eps=sizes.pop("rms_norm_eps"))


@st.composite
def olmo_configs(draw) -> OlmoConfig:
    sizes = draw(llama_sizes())
    del sizes["rms_norm_eps"]
    return OlmoConfig(**sizes, attention_bias=draw(flags), pad_token_id=None)


@st.composite
def arcee_configs(draw) -> ArceeConfig:
    biases = {"attention_bias": draw(flags), "mlp_bias": draw(flags)}
    return ArceeConfig(**draw(llama_sizes()) | {"hidden_act": "relu2"}, **biases)


@st.composite
def seed_oss_configs(draw) -> SeedOssConfig:
    names = ("attention_bias", "attention_out_bias", "mlp_bias")
    return SeedOssConfig(**draw(llama_sizes()), **{name: draw(flags) for name in names})


# As `random_configs.CONFIGS`, where these are among others.
DENSE: dict[str, tuple[st.SearchStrategy[PretrainedConfig], int]] = {
    "glm": (glm_configs(GlmConfig), 4),
    "glm4": (glm_configs(Glm4Config), 4),
    "cohere": (cohere_configs(), 4),
    "cohere2": (cohere2_configs(), 5),
    "exaone4": (exaone4_configs(), 4),
    "ernie4_5": (ernie4_5_configs(), 3),
    "gemma": (gemma_configs(), 3),
    "stablelm": (stablelm_configs(), 4),
    "olmo": (olmo_configs(), 3),
    "phi": (phi_configs(), 4),
    "arcee": (arcee_configs(), 3),
    "seed_oss": (seed_oss_configs(), 3),
}
