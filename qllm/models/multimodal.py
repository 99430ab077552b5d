"""Text models inside multimodal ones, which compute text without images as the text model alone.

A config.json has their settings in its `text_config`, and what both have where transformers has it;
the weights have their tensors under another prefix, beside those of a vision tower. Listed are the
types for which transformers' own class was compared with the text model's: attention to text is
causal, and positions are those of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qllm.models.family import RawConfig

TEXT_CONFIG = "text_config"
# What stands in front of a head, or of other tensors of text: in old files and MLX's the former or
# `language_model.model.`, in those of transformers 5 `model.language_model.`.
OUTER_HEAD = re.compile(r"(?:language_model\.)?lm_head(?=\.)")
NESTED = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?")
FLAT = re.compile(r"model\.(?!visual\.)")
# What a text model has there.
INNER, HEAD = "model.", "lm_head"
# Settings of the outer model that count before those of the text model.
OUTER_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id", "transformers_weights")
QUANTIZATION = "quantization_config"
TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Multimodal:
    """A multimodal model type.

    Attributes:
        text: the model_type of a text model that names none.
        families: families of text models, by the model_type of those that have another one.
        defaults: what such a text model has where it says nothing, and its family has another.
        tied: embedding and head are one where config.json does not say.
        inner_tied: they are as well where the text model's settings say so.
        flat: old files have the text model's settings and tensors where a text model has them.
        module: what transformers calls the text model.
    """

    text: str
    families: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    inner_tied: bool = False
    flat: bool = False
    module: str = "language_model"

    def text_name(self, name: str) -> str | None:
        """What the text model calls a tensor of a file; None: it has none of it."""
        if head := OUTER_HEAD.match(name):
            return HEAD + name[head.end() :]
        found = NESTED.match(name) or (FLAT.match(name) if self.flat else None)
        return INNER + name[found.end() :] if found else None

    def module_name(self, name: str) -> str:
        """What transformers calls a module, or tensor, of the text model."""
        return name.replace(INNER, f"{INNER}{self.module}.", 1) if name.startswith(INNER) else name


# It has no embeddings of layers.
GEMMA4_UNIFIED = {
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
QWEN_VL = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}
QWEN3_VL = {"head_dim": 128, "rope_theta": 5e5}
# Its weights of experts are divided by their sum whatever the settings say.
QWEN3_VL_MOE = {
    "intermediate_size": 5632,
    "max_position_embeddings": 128000,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_local_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": True,
    "rope_theta": 5e5,
}


def _qwen2(name: str) -> Multimodal:
    """Qwen2-VL and Qwen2.5-VL, of which old files have the outer type for the text model's."""
    families = {f"{name}_text": "qwen2", name: "qwen2"}
    return Multimodal(f"{name}_text", families, QWEN_VL, inner_tied=True, flat=True)


MULTIMODAL: dict[str, Multimodal] = {
    "gemma3": Multimodal("gemma3_text", tied=True),
    "gemma4": Multimodal("gemma4_text", tied=True),
    "gemma4_unified": Multimodal(
        "gemma4_unified_text",
        {"gemma4_unified_text": "gemma4_text"},
        GEMMA4_UNIFIED,
        tied=True,
    ),
    "mistral3": Multimodal("mistral", tied=True),
    "llava": Multimodal("llama", inner_tied=True),
    "llava_next": Multimodal("llama"),
    "idefics3": Multimodal("llama", module="text_model"),
    "smolvlm": Multimodal("llama", module="text_model"),
    "qwen2_vl": _qwen2("qwen2_vl"),
    "qwen2_5_vl": _qwen2("qwen2_5_vl"),
    "qwen3_vl": Multimodal("qwen3_vl_text", {"qwen3_vl_text": "qwen3"}, QWEN3_VL),
    "qwen3_vl_moe": Multimodal(
        "qwen3_vl_moe_text", {"qwen3_vl_moe_text": "qwen3_moe"}, QWEN3_VL_MOE
    ),
    "qwen3_5": Multimodal("qwen3_5_text", {"qwen3_5_text": "qwen3_5_text"}),
    "qwen3_5_moe": Multimodal("qwen3_5_moe_text", {"qwen3_5_moe_text": "qwen3_5_moe_text"}),
}


def multimodal_type(name: object) -> Multimodal | None:
    """The multimodal type of a model_type; None: it is none, or one that is not known."""
    return MULTIMODAL.get(name) if isinstance(name, str) else None


def text_of(raw: RawConfig) -> RawConfig:
    """The config.json that the text model of a multimodal one would have; others as they are.

    Raises:
        UserError: for a `text_config` that is no object.
    """
    outer = multimodal_type(raw.values.get("model_type"))
    if outer is None:
        return raw
    inner = raw.values.get(TEXT_CONFIG)
    if inner is None and outer.flat:
        inner = {key: value for key, value in raw.values.items() if key != "vision_config"}
    if not isinstance(inner, Mapping):
        raise raw.error(TEXT_CONFIG, inner, "an object")
    values = {**inner}
    kind = values.get("model_type") or outer.text
    known = isinstance(kind, str) and kind in outer.families
    if known:
        values = {**outer.defaults, **values}
        for key in ("rope_scaling", "rope_parameters"):
            if isinstance(values.get(key), Mapping):
                values[key] = _of_text(values[key])
    values["model_type"] = outer.families[kind] if known else kind
    for key in OUTER_KEYS:
        if raw.values.get(key) is not None:
            values[key] = raw.values[key]
    for key in ("torch_dtype", "dtype"):  # the text model's own is not asked for
        values.pop(key, None)
        if raw.values.get(key) is not None:
            values[key] = raw.values[key]
    if raw.values.get(QUANTIZATION) is not None:
        values[QUANTIZATION] = raw.values[QUANTIZATION]
    tied = raw.flag(TIED, outer.tied)
    if tied or not outer.inner_tied:
        values[TIED] = tied
    return RawConfig(values, raw.where, str(raw.values["model_type"]))


def _of_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of positions in time, height and width, which are one for text (Wang et al. 2024)."""
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    return {
        key: "default" if key in ("type", "rope_type") and value == "mrope" else value
        for key, value in plain.items()
    }
