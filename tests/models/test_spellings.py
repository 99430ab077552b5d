"""Settings that a config.json may spell in two ways: transformers says which one counts."""

from __future__ import annotations

import json

import pytest
from oracle import assert_same_model, draw_prompts, load, random_model
from transformers import AutoConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": 90, "hidden_size": 32}
BASES = {
    "llama": {
        **SIZES,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 24,
    },
    "opt": {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 40},
    "bloom": {**SIZES, "n_layer": 2, "n_head": 2},
}
BASES |= {
    "phi3": {**BASES["llama"], "pad_token_id": None},
    "gpt_neox": BASES["llama"],
    "gemma2": {**BASES["llama"], "head_dim": 16, "num_key_value_heads": 1},
    "gemma3_text": {**BASES["llama"], "head_dim": 16, "num_key_value_heads": 1},
    "gemma4_text": {
        **{**BASES["llama"], "head_dim": 16, "num_key_value_heads": 1},
        "hidden_size_per_layer_input": 0,
    },
    "mistral": {**BASES["llama"], "num_key_value_heads": 1},
    "gpt2": {**SIZES, "n_layer": 2, "n_head": 2},
    "qwen2": {**BASES["llama"], "num_key_value_heads": None},
    "starcoder2": {**BASES["llama"], "num_key_value_heads": 1},
    "granite": BASES["llama"],
    "olmo2": {**BASES["llama"], "pad_token_id": None},
    "olmo3": {**BASES["llama"], "pad_token_id": None},
    "smollm3": {**BASES["llama"], "pad_token_id": None, "num_key_value_heads": None},
}
BASES["ministral3"] = {**BASES["mistral"], "head_dim": 16, "pad_token_id": None}
BASES |= {name: BASES["ministral3"] | {"eos_token_id": 0} for name in ("glm", "glm4")}
IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
BASES |= {name: {**BASES["llama"], **IDS} for name in ("cohere", "cohere2")}
BASES |= {
    "exaone4": BASES["llama"] | {"num_key_value_heads": 1, "eos_token_id": 0},
    "ernie4_5": BASES["llama"] | IDS,
    "gemma": BASES["llama"] | IDS | {"num_key_value_heads": 1},
    "stablelm": BASES["llama"] | {"num_key_value_heads": 1},
    "olmo": BASES["llama"] | IDS,
    "seed_oss": BASES["llama"] | IDS,
    "phi": BASES["llama"],
    "arcee": BASES["llama"],
}
LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
ORIGINAL = "original_max_position_embeddings"

LLAMA = {
    "no theta": {"rope_theta": None},
    "theta outside": {"rope_theta": 500.0},
    "theta inside and outside": {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 77.0}},
    "theta outside of new parameters": {
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default"},
    },
    "old scaling": {"rope_scaling": LINEAR},
    "old scaling and theta": {"rope_scaling": LINEAR, "rope_theta": 500.0},
    "old scaling with a theta": {"rope_scaling": {**LINEAR, "rope_theta": 77.0}, "rope_theta": 5.0},
    "old scaling beside new parameters": {
        "rope_scaling": LINEAR,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "all three": {
        "rope_scaling": LINEAR,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 77.0},
        "rope_theta": 500.0,
    },
    "empty old scaling": {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 77.0}},
    "no old scaling": {"rope_scaling": None, "rope_parameters": {**LINEAR, "rope_theta": 77.0}},
    "type and rope_type": {"rope_scaling": {**LINEAR, "rope_type": "dynamic"}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_theta": 500.0},
    "dynamic with a length that it does not use": {
        "rope_scaling": {"type": "dynamic", "factor": 2.0, ORIGINAL: 4},
        ORIGINAL: 4,
    },
    "llama3": {"rope_scaling": {**LLAMA3, ORIGINAL: 8}, "rope_theta": 500.0},
    "llama3 without its length": {"rope_scaling": LLAMA3},
    "llama3 with its length inside and outside": {
        "rope_scaling": {**LLAMA3, ORIGINAL: 8},
        ORIGINAL: 12,
    },
    "yarn": {"rope_scaling": {**YARN, ORIGINAL: 8}},
    "yarn without its length": {"rope_scaling": YARN},
    "yarn with its length inside and outside": {
        "rope_scaling": {**YARN, ORIGINAL: 8},
        ORIGINAL: 12,
    },
    "yarn whose factor follows from the lengths": {
        "rope_scaling": {"type": "yarn", "factor": None, ORIGINAL: 8}
    },
    "yarn that squeezes": {"rope_scaling": {"type": "yarn", "factor": 0.5, ORIGINAL: 8}},
    "yarn with all parameters": {
        "rope_scaling": {
            **YARN,
            ORIGINAL: 8,
            "beta_fast": 2,
            "beta_slow": 0.5,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
    "yarn with one mscale": {"rope_scaling": {**YARN, ORIGINAL: 8, "mscale": 2.0}},
    "yarn with an attention_factor": {
        "rope_scaling": {
            **YARN,
            ORIGINAL: 8,
            "attention_factor": 1.5,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
            "beta_fast": None,
            "truncate": None,
        }
    },
    "longrope": {"rope_scaling": {**LONG, ORIGINAL: 8}},
    "longrope without its length": {"rope_scaling": LONG},
    "longrope with a factor": {"rope_scaling": {**LONG, ORIGINAL: 8, "factor": 3.0}},
    "longrope with an attention_factor": {
        "rope_scaling": {**LONG, "attention_factor": 2.0},
        ORIGINAL: 8,
    },
    "a part that the plain kind does not know": {"partial_rotary_factor": 0.5},
    "a part of nothing but the whole": {"partial_rotary_factor": 1.0, "rope_scaling": YARN},
    "proportional": {
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"rope_type": "proportional", "factor": 2.0},
    },
    "proportional with the part inside and outside": {
        "partial_rotary_factor": 0.75,
        "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.4},
    },
    "parameters that nobody knows": {"rope_scaling": {**LINEAR, "finetuned": True}},
    "head_dim and key-value heads that are not there": {
        "head_dim": None,
        "num_key_value_heads": None,
    },
    "BLOOM's spellings": {"n_embed": 16, "n_layer": 1, "n_head": 4},
}
BLOOM = {
    "n_embed": {"hidden_size": None, "n_embed": 48},
    "both hidden sizes": {"n_embed": 48},
    "new names": {
        "n_layer": None,
        "n_head": None,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    },
    "old and new names": {"num_hidden_layers": 1, "num_attention_heads": 4},
    "no hidden size, but its null": {"n_embed": None},
}
OPT = {
    "names of other families": {"n_layer": 1, "n_embed": 16, "intermediate_size": 8},
    "no embedding of another size": {"word_embed_proj_dim": None},
}
FACTOR = {"attention_factor": 1.1}
PHI3 = {
    "a part outside": {"partial_rotary_factor": 0.5, "rope_theta": 500.0},
    "a name of old": {
        "rope_scaling": {**LONG, "type": "su", "rope_type": "su", ORIGINAL: 4, **FACTOR},
        ORIGINAL: 1,
    },
    "another name of old": {
        "rope_scaling": {**LONG, "rope_type": "yarn", ORIGINAL: 8, **FACTOR},
        ORIGINAL: 40,
    },
}
GPT_NEOX = {
    "no part": {},
    "names of its own": {"rotary_pct": 0.5, "rotary_emb_base": 500},
    "names of its own beside others": {
        "rotary_pct": 0.5,
        "rotary_emb_base": 500,
        "rope_theta": 77.0,
        "partial_rotary_factor": 1.0,
        "rope_scaling": LINEAR,
    },
    "one after the other": {"use_parallel_residual": False, "rotary_pct": 0.3},
}
GPT2 = {
    "both names": {"n_embd": 48, "num_attention_heads": 4},
    "an inner size": {"n_inner": 24, "activation_function": "relu"},
}
QWEN2 = {"null heads": {"tie_word_embeddings": True}}
QWEN2 |= {
    "windows in the upper layer": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "windows that are not used": {"sliding_window": 4, "max_window_layers": 0},
}
MISTRAL = {"no word of a window": {}, "a window": {"sliding_window": 5}}
GROWING = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.5, ORIGINAL: 7}
MINISTRAL3 = {
    "no word of RoPE": {},
    "a length outside": {"rope_parameters": {**YARN, **GROWING}, ORIGINAL: 5},
    "no length": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}},
    "a short length": {
        "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5},
        "max_position_embeddings": 7,
    },
    "queries of old settings": {"rope_scaling": {**YARN, **GROWING, "mscale": 0.6}},
    "no scaling but of queries": {"rope_parameters": {"rope_type": "default", **GROWING}},
    "no growth, and windows of all layers": {
        "rope_parameters": {**YARN, **GROWING, "llama_4_scaling_beta": 0},
        "sliding_window": 5,
        "layer_types": ["full_attention", "full_attention"],
    },
}
STARCODER2 = {
    "a window, whatever layers are said to be": {
        "sliding_window": 5,
        "layer_types": ["full_attention", "full_attention"],
    },
    "no word of a window, and theta outside": {"rope_theta": 500.0, "use_bias": False},
}
GRANITE = {
    "no word of factors": {"num_key_value_heads": None},
    "whole numbers": {"embedding_multiplier": 3, "logits_scaling": 2, "rope_scaling": LINEAR},
}
SMOLLM3 = {
    "every other layer, and a window that is not used": {
        "no_rope_layer_interval": 2,
        "sliding_window": 4,
    },
    "layers by name, and a window where there is no RoPE": {
        "no_rope_layers": [0, 1, 1],
        "no_rope_layer_interval": 2,
        "sliding_window": 4,
        "use_sliding_window": True,
    },
    "types of layers, whatever is said of using them": {
        "no_rope_layers": [0, 1],
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "theta outside": {"rope_theta": 500.0},
}
GEMMA2 = {
    "no word of caps, and windows in every other layer": {"sliding_window": 4},
    "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
}
LOCAL = {"sliding_window": 4, "sliding_window_pattern": 2}
GEMMA3_TEXT = {
    "bases of old": {**LOCAL, "rope_theta": 500.0, "rope_local_base_freq": 77.0},
    "no bases": LOCAL,
    "scaling of old": {**LOCAL, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "layers by name": {
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
        },
    },
}
GLM = {
    "no word of RoPE": {},
    "a share outside": {"partial_rotary_factor": 0.25, "rope_theta": 500.0},
    "a share outside and inside": {
        "partial_rotary_factor": 0.25,
        "rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 77.0},
    },
    "old scaling": {"rope_scaling": LINEAR},
    "no biases": {"attention_bias": False},
}
COHERE = {
    "no word of a base": {"logit_scale": 0.3},
    "old scaling": {"rope_scaling": LINEAR, "num_key_value_heads": 1},
    "heads of a size of their own": {"head_dim": 8, "rope_theta": 500.0},
}
COHERE2 = {
    "no word of layers": {"num_hidden_layers": 5, "sliding_window": 4},
    "a pattern of old": {"sliding_window_pattern": 2, "sliding_window": 4, "head_dim": 8},
    "layers by name": {
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_theta": 500.0,
    },
}
EXAONE4 = {
    "a pattern": {"num_hidden_layers": 5, "sliding_window": 4, "sliding_window_pattern": 2},
    "layers by name": {
        "sliding_window": 4,
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "no windows": {
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "rope_scaling": LINEAR,
    },
}
ERNIE4_5 = {"no word of heads": {"num_key_value_heads": None}, "biases": {"use_bias": True}}
GEMMA = {
    "what released files say of the activation": {"hidden_act": "gelu"},
    "an activation that is not read": {"hidden_activation": "relu", "head_dim": 16},
}
STABLELM = {
    "no word of a share": {"use_qkv_bias": True},
    "a share outside": {"partial_rotary_factor": 0.5, "use_parallel_residual": True},
}
PHI = {
    "no word of a share": {"num_key_value_heads": 1},
    "a share outside": {"partial_rotary_factor": 0.25, "head_dim": 8},
}
ARCEE = {"no word of the activation": {"rope_scaling": YARN | {"factor": 4.0}}}
OLMO = {"no word of heads": {"num_key_value_heads": None}, "biases": {"attention_bias": True}}
SEED_OSS = {
    "no word of biases": {"num_key_value_heads": None, "head_dim": None},
    "biases": {"attention_out_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
}
GLM4 = {"no word of heads": {"num_attention_heads": 2}, "no word of RoPE": {}}
GEMMA4_TEXT = {
    "no word of layers": {"num_hidden_layers": 7, "sliding_window": 4},
    "the last layer sees all": {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
    "heads of all layers": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "heads of layers that only keys are values have": {
        "num_global_key_value_heads": 2,
        "global_head_dim": 8,
    },
    "heads by layer": {
        "per_layer_config": {"1": {"head_dim": 24, "num_key_value_heads": 2}},
        "global_head_dim": 8,
        "sliding_window": 4,
    },
    "no word of inputs of layers": {
        "hidden_size_per_layer_input": None,
        "vocab_size_per_layer_input": 90,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 4,
        "use_double_wide_mlp": True,
    },
    "a share of a head by name": {
        "global_head_dim": 12,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 50.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 99.0},
        },
    },
}
OLMO2 = {"no word of heads": {"num_key_value_heads": None}, "old scaling": {"rope_scaling": YARN}}
OLMO3 = {
    "bases and scaling of old": {
        "sliding_window": 4,
        "rope_theta": 500.0,
        "rope_scaling": {**YARN, ORIGINAL: 8, "attention_factor": 1.2},
    },
    "no word of layers": {"num_hidden_layers": 5, "sliding_window": 4},
    "layers by name": GEMMA3_TEXT["layers by name"],
    "no windows": {"layer_types": ["full_attention", "full_attention"], "rope_theta": 500.0},
    "one setting for all, which nobody reads": {
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 77.0},
    },
}
TABLE = {
    "mistral": MISTRAL,
    "ministral3": MINISTRAL3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma4_text": GEMMA4_TEXT,
    "llama": LLAMA,
    "bloom": BLOOM,
    "opt": OPT,
    "phi3": PHI3,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "qwen2": QWEN2,
    "starcoder2": STARCODER2,
    "granite": GRANITE,
    "smollm3": SMOLLM3,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "exaone4": EXAONE4,
    "ernie4_5": ERNIE4_5,
    "gemma": GEMMA,
    "stablelm": STABLELM,
    "olmo": OLMO,
    "phi": PHI,
    "arcee": ARCEE,
    "seed_oss": SEED_OSS,
    "glm": GLM,
    "glm4": GLM4,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
}
CASES = [(family, name) for family, cases in TABLE.items() for name in cases]


@pytest.mark.parametrize(("family", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_settings_count_as_in_transformers(family, name, tmp_path):
    changes = TABLE[family][name]
    config = {"model_type": family, **BASES[family], **changes}
    # A null is a value, but of sizes there is none, and transformers refuses a theta that is one.
    dropped = ("rope_theta", "hidden_size", "n_layer", "n_head", "hidden_size_per_layer_input")
    config = {key: v for key, v in config.items() if v is not None or key not in dropped}
    text = json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    theirs = random_model(AutoConfig.from_pretrained(tmp_path))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    # Some prompts are shorter than what the model was trained on, until they are gone on with, and
    # some longer.
    ours = load(tmp_path)
    for lengths in ([6, 3], [18, 12]):
        assert_same_model(ours, theirs, draw_prompts(lengths, 90), 4)
