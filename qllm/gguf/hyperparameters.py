"""What config.json says of most models, by the keys that llama.cpp's architectures share."""

from __future__ import annotations

import math

from qllm.errors import UserError
from qllm.gguf.file import GGUF, GGUFTensor
from qllm.gguf.metadata import Metadata
from qllm.gguf.types import F32

VALUES, ROTARY = "attention.value_length", "rope.dimension_count"
ORIGINAL = "original_max_position_embeddings"
# Mistral 3's: how fast queries grow, the length after which they do, and YaRN's settings.
TEMPERATURE = "attention.temperature_scale"
TRAINED = "rope.scaling.original_context_length"
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
BETAS = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
# Tensors by which frequencies of RoPE are divided: at any length, or up to one and beyond it.
FREQS, SHORT, LONG = "rope_freqs", "rope_factors_short", "rope_factors_long"


def read_llama(
    metadata: Metadata, found: GGUF, *, same: tuple[str, ...] = (VALUES, ROTARY)
) -> dict[str, object]:
    """
    Args:
        same: see `read_sizes`.
    """
    eps = metadata.number(metadata.own("attention.layer_norm_rms_epsilon"))
    return read_sizes(metadata, found, same) | {
        "rms_norm_eps": eps,
        "attention_bias": "blk.0.attn_output.bias" in found.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in found.tensors,
    }


def read_sizes(
    metadata: Metadata, found: GGUF, same: tuple[str, ...] = (VALUES, ROTARY)
) -> dict[str, object]:
    """What all with RoPE and grouped heads have.

    Args:
        same: keys that are to say the channels of a head, where they are there.
    """
    own = metadata.own
    hidden, heads = metadata.count(own("embedding_length")), count_heads(metadata)
    head_dim = metadata.count(own("attention.key_length"), hidden // heads)
    trained = metadata.count(own("context_length"))
    for key in same:
        if metadata.count(own(key), head_dim) != head_dim:
            raise UserError(
                f"{found.path}: {own(key)} is {metadata.values[own(key)]}, the heads have "
                f"{head_dim} channels"
            )
    # Where all layers have experts, some files say nothing of an MLP.
    inner = metadata.values.get(own("expert_feed_forward_length"))
    inner = inner if isinstance(inner, int) else None
    return {
        "hidden_size": hidden,
        "num_hidden_layers": metadata.count(own("block_count")),
        "intermediate_size": metadata.count(own("feed_forward_length"), inner),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count(own("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "max_position_embeddings": trained,
        "rope_parameters": read_rope(metadata, found, trained),
    }


def read_rope(metadata: Metadata, found: GGUF, trained: int) -> dict[str, object]:
    """Rotary embeddings; frequencies that a file has ready are longrope's for any length."""
    own = metadata.own
    rope: dict[str, object] = {"rope_theta": metadata.number(own("rope.freq_base"), 10000.0)}
    kind = metadata.text(own("rope.scaling.type"), "none")
    factors = found.tensors.get(f"{FREQS}.weight")
    if factors is not None:
        values = _floats(factors, found)
        return rope | {
            "rope_type": "longrope",
            "short_factor": values,
            "long_factor": values,
            "factor": 1.0,
            "attention_factor": 1.0,
            ORIGINAL: trained,
        }
    files = [found.tensors.get(f"{name}.weight") for name in (SHORT, LONG)]
    if all(files):
        listed = [_floats(tensor, found) for tensor in files if tensor]
        return rope | {
            "rope_type": "longrope",
            **dict(zip(("short_factor", "long_factor"), listed, strict=True)),
            "attention_factor": metadata.number(own("rope.scaling.attn_factor"), 1.0),
            ORIGINAL: metadata.count(own(TRAINED)),
        }
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UserError(f"{found.path}: {own('rope.scaling.type')} is {kind!r}; QLLM has not that")
    rope |= {"rope_type": kind, "factor": metadata.number(own("rope.scaling.factor"))}
    if kind == "yarn":
        rope[ORIGINAL] = metadata.count(own(TRAINED), trained)
        # It multiplies what YaRN does to cosines and sines anyway.
        attention = metadata.number(own("rope.scaling.attn_factor"), 1.0)
        if attention != 1:
            factor = max(1.0, metadata.number(own("rope.scaling.factor")))
            rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    return rope


def read_mistral3(metadata: Metadata, found: GGUF) -> dict[str, object]:
    """Llama's, with queries that grow, and YaRN that leaves cosines and sines as large as they are.

    What the latter multiplies is in proportion to 1 + 0.1 log(factor), for which the logarithm may
    be multiplied in what it is divided by: 1 in all files that there are.
    """
    own = metadata.own
    values = read_llama(metadata, found)
    rope = values["rope_parameters"]
    assert isinstance(rope, dict)  # as `read_rope` makes it
    rope["llama_4_scaling_beta"] = metadata.number(own(TEMPERATURE), 0.0)
    trained = metadata.count(own("context_length"))
    rope.setdefault(ORIGINAL, metadata.count(own(TRAINED), trained))
    if rope.get("rope_type") == "yarn":
        grown = 0.1 * math.log(max(1.0, rope["factor"]))
        multiplier = metadata.number(own(LOG_MULTIPLIER), 0.0)
        factor = rope.get("attention_factor", 1 + grown) / (1 + multiplier * grown)
        rope |= {"attention_factor": factor, "beta_fast": 32.0, "beta_slow": 1.0}
        for name, key in BETAS.items():
            rope[name] = metadata.number(own(key), rope[name])
    return values | {"sliding_window": None}


def read_partial(metadata: Metadata, head_dim: int) -> dict[str, object]:
    """The share of a head's channels that RoPE turns."""
    rotary = metadata.count(metadata.own(ROTARY), head_dim)
    # transformers cuts the product with the head's channels to a whole number.
    whole = rotary == head_dim or not head_dim
    return {"partial_rotary_factor": 1.0 if whole else (rotary + 0.5) / head_dim}


def _floats(tensor: GGUFTensor, found: GGUF) -> list[float]:
    """The numbers of a short float32 tensor."""
    import torch

    if tensor.type is not F32 or len(tensor.shape) != 1:
        raise UserError(f"{found.path}: factors of RoPE are no list of float32")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return torch.frombuffer(bytearray(file.read(tensor.nbytes)), dtype=torch.float32).tolist()


def read_layer_types(metadata: Metadata, layers: int, every: int) -> list[str]:
    """Which layers have a window.

    Args:
        every: each so many-th layer sees all, where the file does not say which do.
    """
    key = metadata.own("attention.sliding_window_pattern")
    pattern = metadata.values.get(key, every)
    slides = pattern if isinstance(pattern, list) else [False] * layers
    if not isinstance(pattern, list):
        every = metadata.count(key, every)
        slides = [every > 0 and i % every < every - 1 for i in range(layers)]
    return ["sliding_attention" if each else "full_attention" for each in slides]


def count_heads(metadata: Metadata) -> int:
    heads = metadata.count(metadata.own("attention.head_count"))
    if heads < 1:
        raise UserError(f"{metadata.where}: {metadata.own('attention.head_count')} is {heads}")
    return heads
