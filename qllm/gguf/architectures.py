"""llama.cpp's architectures: what config.json would say by the keys that each has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qllm.errors import UserError
from qllm.gguf import families
from qllm.gguf.file import GGUF
from qllm.gguf.hyperparameters import (
    FREQS,
    LONG,
    ORIGINAL,
    SHORT,
    TEMPERATURE,
    VALUES,
    count_heads,
    read_layer_types,
    read_llama,
    read_mistral3,
    read_partial,
    read_rope,
    read_sizes,
)
from qllm.gguf.metadata import Metadata

EXPERTS, USED = "expert_count", "expert_used_count"
EXPERT_SIZE, SHARED_SIZE = "expert_feed_forward_length", "expert_shared_feed_forward_length"


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a model type.

    Attributes:
        model_type: transformers' name.
        config: what config.json says besides what all have.
        permuted: rows of q and k lie in the order of llama.cpp's rotation: pairs side by side.
        norm_offset: what norms' weights have more than in a checkpoint.
        reads: keys of NEUTRAL that `config` reads.
        same: model types that llama.cpp runs as this one.
        fixed: fields of `ModelConfig` that no key tells, and what they are.
        parts: ours of names that stand for something else than in other architectures.
        factors: keys of numbers, and the fields of `ModelConfig` that they are.
        predicts: layers behind the model's own say what comes after the next token.
        written: files of it are written.
        rope_tensors: those of RoPE's factors that llama.cpp loads: it refuses a file with others.
    """

    model_type: str
    config: Callable[[Metadata, GGUF], dict[str, object]]
    permuted: bool = False
    norm_offset: float = 0.0
    reads: frozenset[str] = frozenset()
    same: tuple[str, ...] = ()
    fixed: Mapping[str, object] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, str] = field(default_factory=dict)
    rope_tensors: frozenset[str] = frozenset()
    predicts: bool = False
    written: bool = True


def _gemma2(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return _gemma(metadata, found, every=2, widest=46) | {
        "sliding_window": metadata.count(own("attention.sliding_window"), 4096),
        "attn_logit_softcapping": metadata.number(own("attn_logit_softcapping"), 50.0),
        "final_logit_softcapping": metadata.number(own("final_logit_softcapping"), 30.0),
    }


def _gemma3(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    values = _gemma(metadata, found, every=6, widest=62)
    window = metadata.count(own("attention.sliding_window"), 0)
    if window:
        values["sliding_window"] = window
    else:
        values["layer_types"] = ["full_attention"] * metadata.count(own("block_count"))
    cap = metadata.number(own("final_logit_softcapping"), 0.0)
    local = {"rope_theta": metadata.number(own("rope.freq_base_swa"), 10000.0)}
    ropes = {"full_attention": values["rope_parameters"], "sliding_attention": local}
    return values | {"final_logit_softcapping": cap or None, "rope_parameters": ropes}


def _gemma(metadata: Metadata, found: GGUF, every: int, widest: int) -> dict[str, object]:
    """
    Args:
        every: each so many-th layer sees all, where the file does not say which do.
        widest: layers of the size whose scores are scaled by the width that a head has of all.
    """
    values, layers = read_llama(metadata, found), metadata.count(metadata.own("block_count"))
    head = metadata.count(metadata.own("embedding_length")) / count_heads(metadata)
    return values | {
        "layer_types": read_layer_types(metadata, layers, every),
        "query_pre_attn_scalar": head if layers == widest else values["head_dim"],
    }


def _phi3(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    values = read_llama(metadata, found, same=(VALUES,))
    rope = read_rope(metadata, found, metadata.count(own("context_length")))
    if ORIGINAL in rope:  # outside it wins over the family's own
        values[ORIGINAL] = rope[ORIGINAL]
    head_dim = values["head_dim"]
    assert isinstance(head_dim, int)  # as `read_llama` counts it
    rope |= read_partial(metadata, head_dim)
    window = metadata.count(own("attention.sliding_window"), 0)
    # Where nothing is said of padding, transformers has an id that the model may not have.
    return values | {
        "rope_parameters": rope,
        "sliding_window": window or None,
        "pad_token_id": None,
    }


def _gpt_neox(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    hidden, trained = metadata.count(own("embedding_length")), metadata.count(own("context_length"))
    rope = read_rope(metadata, found, trained)
    rope |= read_partial(metadata, hidden // count_heads(metadata))
    return {
        "hidden_size": hidden,
        "num_hidden_layers": metadata.count(own("block_count")),
        "num_attention_heads": count_heads(metadata),
        "intermediate_size": metadata.count(own("feed_forward_length")),
        "max_position_embeddings": trained,
        "layer_norm_eps": metadata.number(own("attention.layer_norm_epsilon")),
        "use_parallel_residual": metadata.flag(own("use_parallel_residual"), True),
        "attention_bias": "blk.0.attn_qkv.bias" in found.tensors,
        "rope_parameters": rope,
    }


def _bloom(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    hidden = metadata.count(own("embedding_length"))
    inner = metadata.count(own("feed_forward_length"), 4 * hidden)
    if inner != 4 * hidden:
        raise UserError(f"{found.path}: {own('feed_forward_length')} is {inner}, not {4 * hidden}")
    return {
        "hidden_size": hidden,
        "n_layer": metadata.count(own("block_count")),
        "n_head": count_heads(metadata),
        "layer_norm_epsilon": metadata.number(own("attention.layer_norm_epsilon")),
    }


def _gpt2(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return {
        "n_embd": metadata.count(own("embedding_length")),
        "n_layer": metadata.count(own("block_count")),
        "n_head": count_heads(metadata),
        "n_inner": metadata.count(own("feed_forward_length")),
        "n_positions": metadata.count(own("context_length")),
        "layer_norm_epsilon": metadata.number(own("attention.layer_norm_epsilon")),
    }


def _granite(metadata: Metadata, found: GGUF) -> dict[str, object]:
    values, own = read_llama(metadata, found), metadata.own
    if not metadata.flag(own("rope.scaling.finetuned"), True):
        raise UserError(
            f"{found.path}: {own('rope.scaling.finetuned')} is False: its layers have no RoPE, "
            "which QLLM's granite has"
        )
    head_dim = values["head_dim"]
    assert isinstance(head_dim, int)  # as `read_sizes` counts it
    scores = metadata.number(own("attention.scale"), 0.0) or head_dim**-0.5
    return values | {
        "embedding_multiplier": metadata.number(own("embedding_scale"), 0.0) or 1.0,
        "residual_multiplier": metadata.number(own("residual_scale"), 0.0) or 1.0,
        "attention_multiplier": scores,
        "logits_scaling": metadata.number(own("logit_scale")),
    }


def _smollm3(metadata: Metadata, found: GGUF) -> dict[str, object]:
    # Where nothing is said of padding, transformers has an id that the model may not have.
    return read_llama(metadata, found) | {"no_rope_layer_interval": 4, "pad_token_id": None}


def _olmo2(metadata: Metadata, found: GGUF) -> dict[str, object]:
    """OLMo 2's, and with windows OLMo 3's."""
    values, own = read_llama(metadata, found), metadata.own
    values["pad_token_id"] = None  # else transformers has one that the model may not have
    window = metadata.count(own("attention.sliding_window"), 0)
    if not window:
        return values
    layers = metadata.count(own("block_count"))
    base = metadata.number(own("rope.freq_base"), 10000.0)
    local = {"rope_theta": metadata.number(own("rope.freq_base_swa"), base)}
    return values | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": read_layer_types(metadata, layers, every=4),
        "rope_parameters": {
            "full_attention": values["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _starcoder2(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return read_sizes(metadata, found) | {
        "norm_epsilon": metadata.number(own("attention.layer_norm_epsilon")),
        "use_bias": "blk.0.attn_output.bias" in found.tensors,
        "sliding_window": metadata.count(own("attention.sliding_window"), 0) or None,
    }


def _mixtral(metadata: Metadata, found: GGUF) -> dict[str, object]:
    """Llama's, and with experts Mixtral's."""
    values, count = read_llama(metadata, found), _experts(metadata)
    if not count:
        return values
    del values["attention_bias"], values["mlp_bias"]
    return values | {
        "model_type": "mixtral",
        "num_local_experts": count,
        "num_experts_per_tok": metadata.count(metadata.own(USED)),
        "sliding_window": None,
    }


def _qwen2_moe(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return _moe(metadata, found) | {
        "moe_intermediate_size": metadata.count(own(EXPERT_SIZE)),
        "shared_expert_intermediate_size": metadata.count(own(SHARED_SIZE)),
        "qkv_bias": "blk.0.attn_q.bias" in found.tensors,
        "norm_topk_prob": False,
    }


def _qwen3_moe(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return _moe(metadata, found) | {
        "moe_intermediate_size": metadata.count(own(EXPERT_SIZE)),
        "norm_topk_prob": True,
    }


def _qwen3_5_moe(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return families.read_qwen3_5(metadata, found) | {
        "num_experts": _experts(metadata),
        "num_experts_per_tok": metadata.count(own(USED)),
        "moe_intermediate_size": metadata.count(own(EXPERT_SIZE)),
        "shared_expert_intermediate_size": metadata.count(own(SHARED_SIZE)),
    }


def _olmoe(metadata: Metadata, found: GGUF) -> dict[str, object]:
    return _moe(metadata, found) | {"norm_topk_prob": False, "pad_token_id": None}


def _moe(metadata: Metadata, found: GGUF) -> dict[str, object]:
    """What mixtures of experts have besides what Llama has."""
    return read_llama(metadata, found) | {
        "num_experts": _experts(metadata),
        "num_experts_per_tok": metadata.count(metadata.own(USED)),
    }


def _granitemoe(metadata: Metadata, found: GGUF) -> dict[str, object]:
    values = _granite(metadata, found) | {
        "num_local_experts": _experts(metadata),
        "num_experts_per_tok": metadata.count(metadata.own(USED)),
    }
    del values["mlp_bias"]
    return values


def _gpt_oss(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    values = read_llama(metadata, found)
    rope = values["rope_parameters"]
    assert isinstance(rope, dict)  # as `read_rope` makes it
    if rope.get("rope_type") == "yarn":
        rope["truncate"] = False  # as in all that there are
    return values | {
        "num_local_experts": _experts(metadata),
        "num_experts_per_tok": metadata.count(own(USED)),
        "intermediate_size": metadata.count(own(EXPERT_SIZE)),
        "sliding_window": metadata.count(own("attention.sliding_window")),
        "pad_token_id": None,
    }


def _experts(metadata: Metadata) -> int:
    """How many a layer has; 0: it has none."""
    return metadata.count(metadata.own(EXPERTS), 0)


# Numbers of Granite's, by their keys, as `ModelConfig` has them.
FACTORS = {
    "embedding_scale": "embed_scale",
    "residual_scale": "output_scale",
    "attention.scale": "score_scale",
    "logit_scale": "logit_divisor",
}
LOGIT_FACTOR = {"logit_scale": "logit_factor"}
WINDOW = frozenset({"attention.sliding_window"})
BOTH = frozenset({SHORT, LONG})
ALL = BOTH | {FREQS}
PARALLEL = frozenset({"use_parallel_residual"})
MOE = frozenset({EXPERTS})
NO_OUTPUT_BIAS = {"output_bias": False}
NO_BIAS = {"attention_bias": False, "output_bias": False}
BIASES = {"attention_bias": True, "output_bias": True}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        *("llama", _mixtral),
        permuted=True,
        reads=MOE,
        same=("mistral", "mixtral"),
        rope_tensors=ALL,
    ),
    "mistral3": Architecture(
        "ministral3", read_mistral3, permuted=True, reads=frozenset({TEMPERATURE})
    ),
    "qwen2moe": Architecture(
        "qwen2_moe", _qwen2_moe, reads=MOE | {EXPERT_SIZE, SHARED_SIZE}, fixed=NO_OUTPUT_BIAS
    ),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, reads=MOE | {EXPERT_SIZE}, fixed=NO_BIAS),
    "qwen35": Architecture("qwen3_5_text", families.read_qwen3_5, **families.QWEN3_5),
    "qwen35moe": Architecture(
        *("qwen3_5_moe_text", _qwen3_5_moe),
        reads=MOE | {EXPERT_SIZE, SHARED_SIZE},
        **families.QWEN3_5,
    ),
    "olmoe": Architecture("olmoe", _olmoe, reads=MOE, fixed=NO_BIAS),
    "qwen2": Architecture("qwen2", read_llama, fixed=NO_OUTPUT_BIAS),
    "qwen3": Architecture("qwen3", read_llama, fixed=NO_BIAS),
    "gemma2": Architecture(
        "gemma2", _gemma2, norm_offset=1.0, reads=WINDOW, fixed={**NO_BIAS, "tied_head": True}
    ),
    "gemma3": Architecture("gemma3_text", _gemma3, norm_offset=1.0, reads=WINDOW, fixed=NO_BIAS),
    "chatglm": Architecture("glm", families.read_chatglm, permuted=True, fixed=NO_OUTPUT_BIAS),
    "glm4": Architecture("glm4", families.read_glm, permuted=True, fixed=NO_OUTPUT_BIAS),
    "command-r": Architecture(
        *("cohere", families.read_cohere),
        permuted=True,
        reads=frozenset(LOGIT_FACTOR),
        factors=LOGIT_FACTOR,
        fixed={**NO_BIAS, "tied_head": True},
    ),
    "cohere2": Architecture(
        *("cohere2", families.read_cohere2),
        permuted=True,
        reads=WINDOW | LOGIT_FACTOR.keys(),
        factors=LOGIT_FACTOR,
        fixed={**NO_BIAS, "tied_head": True},
    ),
    "exaone4": Architecture(
        *("exaone4", families.read_exaone4),
        reads=WINDOW,
        fixed={**NO_BIAS, "mlp_bias": False},
        rope_tensors=ALL,
    ),
    "ernie4_5": Architecture("ernie4_5", families.read_ernie4_5, permuted=True),
    "gemma": Architecture(
        "gemma", read_llama, norm_offset=1.0, fixed={**NO_BIAS, "tied_head": True}
    ),
    "stablelm": Architecture(
        *("stablelm", families.read_stablelm),
        reads=PARALLEL,
        fixed={"output_bias": False, "tied_head": False},
    ),
    "phi2": Architecture("phi", families.read_phi),
    "arcee": Architecture("arcee", read_llama, permuted=True, rope_tensors=ALL),
    "olmo": Architecture("olmo", families.read_olmo, permuted=True, fixed=NO_BIAS),
    "seed_oss": Architecture(
        *("seed_oss", families.read_seed_oss),
        fixed=NO_OUTPUT_BIAS,
        parts={"post_attention_norm": "mlp_norm"},
    ),
    "phi3": Architecture("phi3", _phi3, reads=WINDOW, rope_tensors=BOTH),
    "gptneox": Architecture(
        "gpt_neox", _gpt_neox, reads=PARALLEL, fixed={**BIASES, "tied_head": False}
    ),
    "bloom": Architecture("bloom", _bloom),
    "gpt2": Architecture("gpt2", _gpt2),
    "granite": Architecture(
        *("granite", _granite),
        permuted=True,
        reads=frozenset(FACTORS),
        factors=FACTORS,
        rope_tensors=ALL,
    ),
    "granitemoe": Architecture(
        *("granitemoe", _granitemoe),
        permuted=True,
        reads=frozenset(FACTORS) | MOE,
        factors=FACTORS,
        rope_tensors=ALL,
    ),
    "gpt-oss": Architecture(
        *("gpt_oss", _gpt_oss),
        reads=WINDOW | MOE | {EXPERT_SIZE},
        fixed=BIASES,
        parts={"post_attention_norm": "mlp_norm"},
    ),
    "smollm3": Architecture(
        "smollm3", _smollm3, permuted=True, fixed={**NO_BIAS, "mlp_bias": False}
    ),
    "olmo2": Architecture(
        "olmo2", _olmo2, reads=WINDOW, same=("olmo3",), fixed={**NO_BIAS, "tied_head": False}
    ),
    "starcoder2": Architecture(
        "starcoder2", _starcoder2, reads=WINDOW, fixed={**BIASES, "mlp_bias": True}
    ),
}
