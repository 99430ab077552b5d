"""SmolLM3 (Hugging Face 2025): Llama of which some layers know nothing of positions (NoPE)."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config = llama.read_config(raw)
    rotated = rotated_layers(raw, config.num_layers)
    sliding = raw.flag("use_sliding_window", False) and raw.values.get("sliding_window") is not None
    return replace(
        config,
        family="smollm3",
        rope_layers=() if all(rotated) else rotated,
        windows=raw.windows(config.num_layers, lambda index: sliding and not rotated[index]),
    )


def rotated_layers(raw: RawConfig, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer has RoPE; "no_rope_layers" has a 1 where it does."""
    listed = raw.values.get("no_rope_layers")
    if listed is None:
        every = raw.count("no_rope_layer_interval", default=4)
        return tuple((index + 1) % every != 0 for index in range(num_layers))
    if not isinstance(listed, list) or len(listed) < num_layers or set(listed) - {0, 1}:
        raise raw.error("no_rope_layers", listed, f"a list of {num_layers} of 0 and 1")
    return tuple(bool(each) for each in listed[:num_layers])


SMOLLM3: Family = replace(llama.LLAMA, name="smollm3", read_config=read_config)
