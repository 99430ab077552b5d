"""Multimodal models of every type whose text model QLLM runs, and how one gets into a file."""

from __future__ import annotations

import torch
from foreign import Folder
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma4Config,
    Gemma4UnifiedConfig,
    Idefics3Config,
    LlavaConfig,
    LlavaNextConfig,
    Mistral3Config,
    PixtralVisionConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

VOCABULARY, IMAGE = 90, {"image_token_id": 89}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
HEADS = TEXT | {"head_dim": 6}
SEES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA4 = {"global_head_dim": 10, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
INPUTS_OF_LAYERS = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY}
OF_GEMMA4 = {"audio_token_id": 88, "video_token_id": 87}
# Prompts go on beyond the length where queries grow.
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "mscale": 1.0},
    **{"mscale_all_dim": 0.7, "llama_4_scaling_beta": 0.1},
    "original_max_position_embeddings": 4,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
OF_QWEN = {"depth": 1, "num_heads": 2, "intermediate_size": 24}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DELTA_NET = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
}
QWEN_TOKENS = IMAGE | {
    **{"video_token_id": 88, "vision_start_token_id": 87, "vision_end_token_id": 86},
}


def configs() -> dict[str, PretrainedConfig]:
    """One of each type, and of some with text models of several families."""
    clip, siglip = (kind(**SEES).to_dict() for kind in (CLIPVisionConfig, SiglipVisionConfig))
    pixtral = PixtralVisionConfig(**SEES, head_dim=8).to_dict()
    llama, mistral = (
        {"model_type": kind, "pad_token_id": None, **TEXT} for kind in ("llama", "mistral")
    )
    qwen = TEXT | {"rope_parameters": MROPE}
    qwen3 = qwen | {"head_dim": 8, "rope_parameters": MROPE | {"mrope_interleaved": True}}
    sees = OF_QWEN | {"hidden_size": 24, "out_hidden_size": 32, "num_position_embeddings": 16}
    sees |= {"deepstack_visual_indexes": [0]}
    hybrid = qwen3 | DELTA_NET
    blind = {key: value for key, value in sees.items() if key != "deepstack_visual_indexes"}
    ministral = {"model_type": "ministral3", **HEADS, "rope_parameters": YARN, "pad_token_id": None}
    return {
        "gemma3": Gemma3Config(
            text_config=HEADS | WINDOWS, vision_config=siglip, mm_tokens_per_image=4, **IMAGE
        ),
        "gemma4": Gemma4Config(
            text_config=HEADS | WINDOWS | GEMMA4 | INPUTS_OF_LAYERS,
            vision_config={**SEES, "num_key_value_heads": 2, "head_dim": 8},
            **IMAGE | OF_GEMMA4,
        ),
        "gemma4_unified": Gemma4UnifiedConfig(
            text_config=HEADS | WINDOWS | GEMMA4, **IMAGE | OF_GEMMA4
        ),
        "mistral3": Mistral3Config(
            text_config=mistral, vision_config=pixtral, tie_word_embeddings=False, **IMAGE
        ),
        "mistral3 of ministral3": Mistral3Config(
            text_config=ministral, vision_config=pixtral, tie_word_embeddings=True, **IMAGE
        ),
        "llava": LlavaConfig(text_config=llama, vision_config=clip, **IMAGE),
        "llava of qwen2": LlavaConfig(
            text_config={"model_type": "qwen2", **TEXT, "tie_word_embeddings": True},
            vision_config=siglip,
            **IMAGE,
        ),
        "llava_next": LlavaNextConfig(text_config=mistral, vision_config=clip, **IMAGE),
        "idefics3": Idefics3Config(text_config=llama, vision_config=SEES, **IMAGE),
        "smolvlm": SmolVLMConfig(text_config=llama, vision_config=SEES, **IMAGE),
        "qwen2_vl": Qwen2VLConfig(
            text_config=qwen,
            vision_config={"depth": 1, "num_heads": 2, "embed_dim": 24, "hidden_size": 32},
            **QWEN_TOKENS,
        ),
        "qwen2_5_vl": Qwen2_5_VLConfig(
            text_config=qwen,
            vision_config=OF_QWEN
            | {"hidden_size": 24, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
            **QWEN_TOKENS,
        ),
        "qwen3_vl": Qwen3VLConfig(text_config=qwen3, vision_config=sees, **QWEN_TOKENS),
        "qwen3_vl_moe": Qwen3VLMoeConfig(
            text_config=qwen3 | EXPERTS, vision_config=sees, **QWEN_TOKENS
        ),
        "qwen3_5": Qwen3_5Config(text_config=hybrid, vision_config=blind, **QWEN_TOKENS),
        "qwen3_5_moe": Qwen3_5MoeConfig(
            text_config=hybrid | EXPERTS, vision_config=blind, **QWEN_TOKENS
        ),
    }


def put_inside(
    folder: Folder,
    outer: str,
    prefix: str = "model.language_model.",
    head: str = "lm_head.",
    **settings: object,
) -> None:
    """Make a text model's checkpoint that of a multimodal one, of which it is a part.

    Args:
        settings: of its config.json.
    """
    renamed = {}
    for name, tensor in folder.state.items():
        own = name.replace("model.", prefix, 1) if name.startswith("model.") else name
        renamed[own.replace("lm_head.", head, 1) if own.startswith("lm_head.") else own] = tensor
    # Of types that no layer has.
    renamed["vision_tower.layers.0.weight"] = torch.zeros(4, 4, dtype=torch.int8)
    renamed["multi_modal_projector.linear_1.weight"] = torch.full((4, 4), torch.nan)
    folder.state = renamed
    text = dict(folder.config)
    above = {key: text.pop(key) for key in ("quantization_config", "quantization") if key in text}
    tied = text.pop("tie_word_embeddings", False)
    folder.config = {"model_type": outer, "text_config": text, "vision_config": {}, **above}
    folder.config |= {"tie_word_embeddings": tied, **settings}
