"""Small random models, samples and text for the tests that quantize."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from oracle import draw_prompts, random_model
from transformers import (
    BloomConfig,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

VOCAB = 90
OPT = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 40}
LLAMA = {**OPT, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 70}
GEMMA = {**LLAMA, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 9}
DELTA_NET = {
    **{"num_key_value_heads": 2, "head_dim": 12, "pad_token_id": None},
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 6, "linear_key_head_dim": 10, "linear_value_head_dim": 14},
}

# A model of each kind that the layers' norms, activations and heads tell apart. Sizes are no
# multiples of 32, so that packing and groups have a remainder.
MODELS: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(**OPT, hidden_size=40, num_attention_heads=4, ffn_dim=70),
    "opt untied": OPTConfig(
        **OPT, hidden_size=40, num_attention_heads=4, ffn_dim=70, tie_word_embeddings=False
    ),
    "opt-350m": OPTConfig(
        **OPT,
        hidden_size=40,
        num_attention_heads=4,
        ffn_dim=70,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
    ),
    "galactica": OPTConfig(
        **OPT,
        hidden_size=40,
        num_attention_heads=4,
        ffn_dim=70,
        activation_function="gelu",
        enable_bias=False,
        layer_norm_elementwise_affine=False,
    ),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=40, n_head=5, n_layer=2),
    "bloom with normed residuals": BloomConfig(
        vocab_size=VOCAB,
        hidden_size=40,
        n_head=5,
        n_layer=2,
        apply_residual_connection_post_layernorm=True,
    ),
    "llama": LlamaConfig(**LLAMA, num_key_value_heads=2, head_dim=10),
    "llama with all heads": LlamaConfig(**LLAMA, num_key_value_heads=6),
    "llama with one key-value head": LlamaConfig(
        **LLAMA,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        hidden_act="relu",
        tie_word_embeddings=True,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **LLAMA,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=36,
        shared_expert_intermediate_size=44,
    ),
    "qwen3": Qwen3Config(**LLAMA, num_key_value_heads=3, head_dim=10),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=20.0),
    "gemma3_text": Gemma3TextConfig(**GEMMA, layer_types=["full_attention", "sliding_attention"]),
    "gemma4_text with inputs of layers": Gemma4TextConfig(  # whose last layers have no keys
        **GEMMA | {"num_hidden_layers": 4},
        layer_types=["sliding_attention", "full_attention"] * 2,
        global_head_dim=14,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=VOCAB,
    ),
    "gemma4_text": Gemma4TextConfig(  # whose heads are of two sizes, with experts beside an MLP
        **GEMMA,
        layer_types=["sliding_attention", "full_attention"],
        global_head_dim=14,
        num_global_key_value_heads=3,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=36,
    ),
    "ministral3": Ministral3Config(  # whose queries grow from the seventh token on
        **LLAMA,
        num_key_value_heads=2,
        head_dim=10,
        pad_token_id=None,
        rope_parameters={
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 1.0},
            **{"mscale_all_dim": 0.7, "llama_4_scaling_beta": 0.3},
            "original_max_position_embeddings": 6,
        },
    ),
    "phi3": Phi3Config(
        **LLAMA,
        num_key_value_heads=2,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.75},
    ),
    "phi": PhiConfig(**LLAMA),
    "gpt_neox": GPTNeoXConfig(**LLAMA, rope_parameters={"rope_type": "default"}),
    "glm4": Glm4Config(**LLAMA, num_key_value_heads=2, head_dim=10, pad_token_id=None),
    "cohere2": Cohere2Config(  # of which one layer is not rotated, and sees all
        **LLAMA,
        num_key_value_heads=2,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
        logit_scale=0.3,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    ),
    "granite": GraniteConfig(
        **LLAMA,
        num_key_value_heads=3,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.22,
        logits_scaling=1.7,
    ),
    "olmo2": Olmo2Config(**LLAMA, num_key_value_heads=3, pad_token_id=None),
    "qwen3_5": Qwen3_5TextConfig(**LLAMA, **DELTA_NET),
    "qwen3_next": Qwen3NextConfig(
        **LLAMA,
        **DELTA_NET,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=36,
        shared_expert_intermediate_size=44,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=40, n_layer=2, n_head=5, n_inner=70, n_positions=40
    ),
}

# Of which transformers reads the experts of a layer as one tensor alone, and QLLM writes each.
STACKED = ("gemma4_text",)

TEXT = "\n".join(
    f"In {year} the {noun} of the {other} was {how}, and nobody who had been there would say why."
    for year in range(1801, 1811)
    for noun in ("house", "king", "river", "war")
    for other in ("city", "church", "island")
    for how in ("lost", "no longer what it had been")
)


@cache
def _files(name: str, dtype: torch.dtype, seed: int) -> dict[str, bytes]:
    """What transformers saves of one of MODELS."""
    with tempfile.TemporaryDirectory() as folder:
        # A copy: a model writes its type into its configuration.
        random_model(deepcopy(MODELS[name]), seed).to(dtype).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """One of MODELS as a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in _files(name, dtype, seed).items():
        (folder / file).write_bytes(data)
    return folder


def samples(count: int = 6, length: int = 24, seed: int = 0) -> list[list[int]]:
    """Calibration samples for one of MODELS."""
    return draw_prompts([length] * count, VOCAB, seed)
