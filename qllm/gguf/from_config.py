"""A model's configuration as a file's hyperparameters: `qllm.gguf.config`, the other way round."""

from __future__ import annotations

from qllm.config import ModelConfig, RopeConfig
from qllm.errors import UserError
from qllm.gguf.architectures import (
    ARCHITECTURES,
    EXPERT_SIZE,
    EXPERTS,
    SHARED_SIZE,
    USED,
)
from qllm.gguf.file import Value
from qllm.gguf.hyperparameters import (
    BETAS,
    FREQS,
    LOG_MULTIPLIER,
    LONG,
    ROTARY,
    SHORT,
    TEMPERATURE,
    TRAINED,
    VALUES,
)

# By the model type that it is for, an architecture's name.
NAMES = {
    model_type: name
    for name, architecture in ARCHITECTURES.items()
    for model_type in (architecture.model_type, *architecture.same)
    if architecture.written
}
SCALING = "rope.scaling.type"


def architecture_name(config: ModelConfig) -> str:
    """llama.cpp's name of what runs a model.

    Raises:
        UserError: for a family that it has not.
    """
    if config.family not in NAMES:
        raise UserError(
            f"GGUF files are written of {', '.join(NAMES)}, not of this {config.family}"
        )
    return NAMES[config.family]


def hyperparameters(config: ModelConfig) -> dict[str, Value]:
    """A file's metadata but for its tokenizer's.

    What no key can tell is left to the caller, who reads them back.

    Raises:
        UserError: for a family that llama.cpp has not, or a RoPE that it has not of this family.
    """
    name = architecture_name(config)
    reads = ARCHITECTURES[name].reads
    own: dict[str, Value] = {
        "block_count": config.num_layers,
        "context_length": config.trained_positions or config.max_positions or 2048,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
    }
    short = "rms_" if config.norm == "rmsnorm" else ""
    own[f"attention.layer_norm_{short}epsilon"] = config.norm_eps
    if "use_parallel_residual" in reads:
        own["use_parallel_residual"] = config.parallel_blocks
    if "attention.sliding_window" in reads and any(config.windows):
        own["attention.sliding_window"] = max(config.windows)
    if config.experts is not None:
        own[EXPERTS], own[USED] = config.experts.count, config.experts.top_k
        sizes = {EXPERT_SIZE: config.experts.intermediate_size}
        sizes[SHARED_SIZE] = config.experts.shared_size
        own |= {key: size for key, size in sizes.items() if key in reads}
    for key, field in ARCHITECTURES[name].factors.items():
        own[key] = vars(config)[field]
    if config.score_cap is not None:
        own["attn_logit_softcapping"] = config.score_cap
    if config.logit_cap is not None:
        own["final_logit_softcapping"] = config.logit_cap
    if config.rope is not None:
        own |= {"attention.key_length": config.head_dim, VALUES: config.head_dim}
        own |= _rope(config.rope, config.head_dim, rope_factors(config))
        if TEMPERATURE in reads:
            own |= _mistral3(config.rope)
    if config.window_rope is not None:
        own["rope.freq_base_swa"] = config.window_rope.theta
    return {
        "general.architecture": name,
        **{f"{name}.{key}": value for key, value in own.items()},
    }


def _rope(rope: RopeConfig, head_dim: int, factors: tuple[str, ...]) -> dict[str, Value]:
    """
    Args:
        factors: the tensors of `rope_factors`.
    """
    if rope.kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise UserError(f"GGUF files cannot tell the RoPE of this model, {rope.kind}")
    found: dict[str, Value] = {
        ROTARY: rope.rotary_dim or head_dim,
        "rope.freq_base": rope.theta,
    }
    if rope.kind in ("linear", "yarn"):
        found[SCALING] = rope.kind
        found["rope.scaling.factor"] = rope.factor
    if rope.kind == "yarn" or LONG in factors:
        found[TRAINED] = rope.original_max_positions
    if LONG in factors:
        # Without the type llama.cpp looks for the tensor of any length, but in Phi-3.
        found |= {SCALING: "longrope", "rope.scaling.attn_factor": rope.attention_factor}
    return found


def _mistral3(rope: RopeConfig) -> dict[str, Value]:
    """What that architecture alone has of RoPE."""
    found: dict[str, Value] = {}
    if rope.query_beta:
        found |= {TEMPERATURE: rope.query_beta, TRAINED: rope.query_span}
    if rope.kind == "yarn":
        found |= {key: getattr(rope, name) for name, key in BETAS.items()}
        if rope.attention_factor == 1:  # else it grows with the factor, which needs no key
            found[LOG_MULTIPLIER] = 1.0
    return found


def rope_factors(config: ModelConfig) -> tuple[str, ...]:
    """The tensors by which a file divides frequencies; it has none of most kinds of RoPE.

    Raises:
        UserError: for factors that llama.cpp does not load of this family.
    """
    rope = config.rope
    if rope is None or rope.kind not in ("llama3", "longrope"):
        return ()
    name = architecture_name(config)
    same = rope.short_factor == rope.long_factor and rope.attention_factor == 1  # at any length
    ways: list[tuple[str, ...]] = [(FREQS,)] if same else []
    if rope.kind == "longrope":
        ways.append((SHORT, LONG))
    for tensors in ways:
        if ARCHITECTURES[name].rope_tensors.issuperset(tensors):
            return tensors
    raise UserError(
        f"llama.cpp's {name} does not divide frequencies of RoPE, as {rope.kind} of this model "
        "does: no GGUF file can be written of it; of default, linear and yarn one can, and from "
        "safetensors the model runs as it is"
    )
