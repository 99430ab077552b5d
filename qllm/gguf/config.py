"""A file's hyperparameters as the config.json that transformers would have for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qllm.errors import UserError
from qllm.gguf.file import GGUF
from qllm.gguf.metadata import Metadata
from qllm.gguf.types import F32

# Tokens that end a text whatever a file calls its EOS, as in llama.cpp.
ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
CONTROL = 3  # of tokenizer.ggml.token_type
# Present with another value, each of these makes another model.
NEUTRAL = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 0.0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a model type.

    Attributes:
        model_type: transformers' name.
        config: what config.json says besides what all have.
        permuted: rows of q and k lie in the order of llama.cpp's rotation: pairs side by side.
    """

    model_type: str
    config: Callable[[Metadata, GGUF], dict[str, object]]
    permuted: bool = False


def architecture_of(metadata: Metadata) -> Architecture:
    """The row of a file's architecture.

    Raises:
        UserError: for one that QLLM does not run.
    """
    if metadata.architecture not in ARCHITECTURES:
        raise UserError(
            f"{metadata.where}: its architecture is {metadata.architecture!r}; QLLM runs "
            f"{', '.join(ARCHITECTURES)} from GGUF files"
        )
    return ARCHITECTURES[metadata.architecture]


def read_config(found: GGUF) -> dict[str, object]:
    """The config.json of a model.

    Raises:
        UserError: for an architecture that QLLM does not run, or hyperparameters that are missing
            or cannot be.
    """
    metadata = Metadata(found)
    architecture = architecture_of(metadata)
    for key, neutral in NEUTRAL.items():
        value = metadata.values.get(metadata.own(key), neutral)
        if value != neutral:
            raise UserError(
                f"{found.path}: {metadata.own(key)} is {value!r}; QLLM's {architecture.model_type} "
                f"has none"
            )
    embed = found.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise UserError(f"{found.path} has no matrix token_embd.weight")
    return {
        "model_type": architecture.model_type,
        "vocab_size": embed.shape[0],
        "tie_word_embeddings": "output.weight" not in found.tensors,
        "eos_token_id": _ends(metadata),
        "dtype": _dtype(found),
        **architecture.config(metadata, found),
    }


def _ends(metadata: Metadata) -> list[int]:
    """Ids of the tokens that end a text."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    found = {metadata.count(key) for key in keys if key in metadata.values}
    tokens = metadata.texts("tokenizer.ggml.tokens", [])
    types = metadata.numbers("tokenizer.ggml.token_type", [])
    if len(types) == len(tokens):
        wanted = set(ENDS)
        found |= {i for i, text in enumerate(tokens) if text in wanted and types[i] == CONTROL}
    return sorted(found)


def _dtype(found: GGUF) -> str:
    """What a model is computed in: its own plain type, float16 where it has none but float32's."""
    names = {tensor.type.name for tensor in found.tensors.values() if len(tensor.shape) > 1}
    if names == {"F32"}:
        return "float32"
    return "bfloat16" if "BF16" in names else "float16"


def _llama(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    hidden, heads = metadata.count(own("embedding_length")), _heads(metadata)
    head_dim = metadata.count(own("attention.key_length"), hidden // heads)
    trained = metadata.count(own("context_length"))
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.count(own(key), head_dim) != head_dim:
            raise UserError(
                f"{found.path}: {own(key)} is {metadata.values[own(key)]}, the heads have "
                f"{head_dim} channels"
            )
    return {
        "hidden_size": hidden,
        "num_hidden_layers": metadata.count(own("block_count")),
        "intermediate_size": metadata.count(own("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count(own("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "max_position_embeddings": trained,
        "rms_norm_eps": metadata.number(own("attention.layer_norm_rms_epsilon")),
        "attention_bias": "blk.0.attn_output.bias" in found.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in found.tensors,
        "rope_parameters": _rope(metadata, found, trained),
    }


def _rope(metadata: Metadata, found: GGUF, trained: int) -> dict[str, object]:
    """Rotary embeddings; frequencies that a file has ready are longrope's for any length."""
    own = metadata.own
    rope: dict[str, object] = {"rope_theta": metadata.number(own("rope.freq_base"), 10000.0)}
    kind = metadata.text(own("rope.scaling.type"), "none")
    factors = found.tensors.get("rope_freqs.weight")
    if factors is not None:
        if factors.type is not F32 or len(factors.shape) != 1:
            raise UserError(f"{found.path}: rope_freqs.weight is no list of float32")
        values = _floats(factors)
        return rope | {
            "rope_type": "longrope",
            "short_factor": values,
            "long_factor": values,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": trained,
        }
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UserError(f"{found.path}: {own('rope.scaling.type')} is {kind!r}; QLLM has not that")
    rope |= {"rope_type": kind, "factor": metadata.number(own("rope.scaling.factor"))}
    if kind == "yarn":
        original = own("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = metadata.count(original, trained)
    return rope


def _floats(tensor: object) -> list[float]:
    """The numbers of a short float32 tensor."""
    import torch

    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=torch.float32).tolist()


def _bloom(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    hidden = metadata.count(own("embedding_length"))
    inner = metadata.count(own("feed_forward_length"), 4 * hidden)
    if inner != 4 * hidden:
        raise UserError(f"{found.path}: {own('feed_forward_length')} is {inner}, not {4 * hidden}")
    return {
        "hidden_size": hidden,
        "n_layer": metadata.count(own("block_count")),
        "n_head": _heads(metadata),
        "layer_norm_epsilon": metadata.number(own("attention.layer_norm_epsilon")),
    }


def _gpt2(metadata: Metadata, found: GGUF) -> dict[str, object]:
    own = metadata.own
    return {
        "n_embd": metadata.count(own("embedding_length")),
        "n_layer": metadata.count(own("block_count")),
        "n_head": _heads(metadata),
        "n_inner": metadata.count(own("feed_forward_length")),
        "n_positions": metadata.count(own("context_length")),
        "layer_norm_epsilon": metadata.number(own("attention.layer_norm_epsilon")),
    }


def _heads(metadata: Metadata) -> int:
    heads = metadata.count(metadata.own("attention.head_count"))
    if heads < 1:
        raise UserError(f"{metadata.where}: {metadata.own('attention.head_count')} is {heads}")
    return heads


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _llama, permuted=True),
    "qwen2": Architecture("qwen2", _llama),
    "qwen3": Architecture("qwen3", _llama),
    "bloom": Architecture("bloom", _bloom),
    "gpt2": Architecture("gpt2", _gpt2),
}
