"""A small model of random weights of each family that GGUF files are read and written of."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 300
SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4}
LLAMA = SIZES | {
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(*, tied: bool = True) -> nn.Module:
    return made(LlamaForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=tied))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return made(Qwen2ForCausalLM, Qwen2Config(**LLAMA))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return made(Qwen3ForCausalLM, Qwen3Config(**LLAMA, head_dim=32))


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return made(BloomForCausalLM, BloomConfig(**SIZES, n_layer=2))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return made(GPT2LMHeadModel, GPT2Config(**SIZES, n_layer=2, n_positions=64))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    more = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4, **caps}
    return made(Gemma2ForCausalLM, Gemma2Config(**LLAMA, **more, attn_implementation="eager"))


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sliding = ["sliding_attention"] * 5 + ["full_attention"]
    more = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    sizes = LLAMA | {"num_hidden_layers": 6}
    config = Gemma3TextConfig(**sizes, **more, layer_types=sliding, rope_parameters=ropes)
    return made(Gemma3ForCausalLM, config)


def phi3(*, long: bool = True) -> nn.Module:
    """
    Args:
        long: has LongRoPE.
    """
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.375}
    more = {"pad_token_id": 0, "eos_token_id": 0}
    if long:
        more["original_max_position_embeddings"] = 32
        factors = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [3.0, 4.0, 5.0]}
        rope |= factors | {"rope_type": "longrope", "original_max_position_embeddings": 32}
    return made(Phi3ForCausalLM, Phi3Config(**LLAMA, **more, rope_parameters=rope))


def gptneox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = SIZES | {"intermediate_size": 96, "num_hidden_layers": 2, "rotary_pct": 0.25}
    config = GPTNeoXConfig(**sizes, max_position_embeddings=64)
    return made(GPTNeoXForCausalLM, config)


def starcoder2() -> nn.Module:
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    return made(Starcoder2ForCausalLM, Starcoder2Config(**LLAMA, hidden_act="gelu_pytorch_tanh"))


GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "logits_scaling": 1.7}
GRANITE |= {"residual_multiplier": 0.22}


def granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    return made(GraniteForCausalLM, GraniteConfig(**LLAMA, **GRANITE))


def smollm3() -> nn.Module:
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    sizes = LLAMA | {"num_hidden_layers": 5, "pad_token_id": None}
    return made(SmolLM3ForCausalLM, SmolLM3Config(**sizes))


GLM = {"pad_token_id": None, "eos_token_id": 0}


def glm() -> nn.Module:
    from transformers import GlmConfig, GlmForCausalLM

    return made(GlmForCausalLM, GlmConfig(**LLAMA, **GLM, head_dim=16))


def glm4() -> nn.Module:
    from transformers import Glm4Config, Glm4ForCausalLM

    return made(Glm4ForCausalLM, Glm4Config(**LLAMA, **GLM, head_dim=32))


IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)


def cohere() -> nn.Module:
    from transformers import CohereConfig, CohereForCausalLM

    return made(CohereForCausalLM, CohereConfig(**LLAMA, **IDS, logit_scale=0.3))


def cohere2() -> nn.Module:
    from transformers import Cohere2Config, Cohere2ForCausalLM

    more = {"num_hidden_layers": 5, "sliding_window": 4, "logit_scale": 0.3}
    return made(Cohere2ForCausalLM, Cohere2Config(**LLAMA | IDS | more))


def exaone4() -> nn.Module:
    from transformers import Exaone4Config, Exaone4ForCausalLM

    types = ["full_attention"] * 2
    return made(
        Exaone4ForCausalLM,
        Exaone4Config(**LLAMA, head_dim=16, sliding_window=None, layer_types=types),
    )


def ernie4_5() -> nn.Module:
    from transformers import Ernie4_5Config, Ernie4_5ForCausalLM

    return made(Ernie4_5ForCausalLM, Ernie4_5Config(**LLAMA, **IDS, head_dim=32))


def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return made(GemmaForCausalLM, GemmaConfig(**LLAMA, **IDS, head_dim=32))


def stablelm() -> nn.Module:
    from transformers import StableLmConfig, StableLmForCausalLM

    more = {"use_qkv_bias": True, "use_parallel_residual": True}
    return made(StableLmForCausalLM, StableLmConfig(**LLAMA, **IDS, **more))


def phi() -> nn.Module:
    from transformers import PhiConfig, PhiForCausalLM

    return made(PhiForCausalLM, PhiConfig(**LLAMA, **IDS))


def arcee() -> nn.Module:
    from transformers import ArceeConfig, ArceeForCausalLM

    return made(ArceeForCausalLM, ArceeConfig(**LLAMA, **IDS))


def olmo() -> nn.Module:
    from transformers import OlmoConfig, OlmoForCausalLM

    return made(OlmoForCausalLM, OlmoConfig(**LLAMA, **IDS))


def seed_oss() -> nn.Module:
    from transformers import SeedOssConfig, SeedOssForCausalLM

    return made(SeedOssForCausalLM, SeedOssConfig(**LLAMA, **IDS, head_dim=32))


def olmo2() -> nn.Module:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    return made(Olmo2ForCausalLM, Olmo2Config(**LLAMA, pad_token_id=None))


def olmo3() -> nn.Module:
    from transformers import Olmo3Config, Olmo3ForCausalLM

    yarn = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0}
    ropes = {
        "full_attention": yarn | {"original_max_position_embeddings": 16},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
    }
    more = {"num_hidden_layers": 4, "sliding_window": 4, "pad_token_id": None}
    return made(Olmo3ForCausalLM, Olmo3Config(**LLAMA | more, rope_parameters=ropes))


def ministral3() -> nn.Module:
    from transformers import Ministral3Config, Ministral3ForCausalLM

    # Queries grow every eight tokens, so much that it shows.
    rope = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "llama_4_scaling_beta": 0.7}
    rope |= {"original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0}
    more = {"head_dim": 32, "rope_parameters": rope | {"beta_fast": 4.0, "beta_slow": 0.5}}
    return made(Ministral3ForCausalLM, Ministral3Config(**LLAMA, **more))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return made(MixtralForCausalLM, MixtralConfig(**LLAMA, **experts))


DELTA_NET = {
    **{"head_dim": 32, "full_attention_interval": 2, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 6, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}


def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    return made(Qwen2MoeForCausalLM, Qwen2MoeConfig(**LLAMA, **EXPERTS, **sizes))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 32, "head_dim": 32, "norm_topk_prob": True}
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**LLAMA, **EXPERTS, **sizes))


def olmoe() -> nn.Module:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = LLAMA | {"num_key_value_heads": 4, "pad_token_id": None}
    return made(OlmoeForCausalLM, OlmoeConfig(**sizes, **EXPERTS))


def granitemoe() -> nn.Module:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return made(GraniteMoeForCausalLM, GraniteMoeConfig(**LLAMA, **GRANITE, **experts))


def gpt_oss() -> nn.Module:
    """One whose RoPE is not stretched: llama.cpp rounds the ends of YaRN's ramp."""
    from transformers import GptOssConfig, GptOssForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
    rope = {"rope_type": "default", "rope_theta": 5e4}
    config = GptOssConfig(**LLAMA, **experts, head_dim=32, rope_parameters=rope)
    return made(GptOssForCausalLM, config)


FAMILIES = {
    **{"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "bloom": bloom, "gpt2": gpt2},
    **{"gemma2": gemma2, "gemma3": gemma3, "phi3": phi3, "gptneox": gptneox},
    **{"starcoder2": starcoder2, "granite": granite, "smollm3": smollm3},
    **{"olmo2": olmo2, "olmo3": olmo3, "ministral3": ministral3},
    **{"glm": glm, "glm4": glm4, "cohere": cohere, "cohere2": cohere2},
    **{"exaone4": exaone4, "ernie4_5": ernie4_5, "gemma": gemma},
    **{"stablelm": stablelm, "olmo": olmo, "seed_oss": seed_oss, "phi": phi},
    **{"arcee": arcee},
    **{"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "olmoe": olmoe},
    **{"granitemoe": granitemoe, "gpt_oss": gpt_oss},
}


def qwen3_5(**more: object) -> nn.Module:
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    return made(Qwen3_5ForCausalLM, Qwen3_5TextConfig(**LLAMA | DELTA_NET | more))


def qwen3_5_moe() -> nn.Module:
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    return made(Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig(**LLAMA | DELTA_NET | EXPERTS | sizes))


# Of which no files are written.
READ_ALONE = {"qwen3_5": qwen3_5, "qwen3_5_moe": qwen3_5_moe}


def made(kind: type, config: object) -> nn.Module:
    """A model of random weights, none of which is a plain 0 or 1."""
    torch.manual_seed(0)
    model = kind(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        around = 1.0 if "norm" in name or ".ln_" in name else 0.0
        weight.normal_(around if name.endswith("weight") else 0.0, 0.1)
    return model
