"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with biases in front of attention."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config = llama.read_config(raw)
    return replace(
        config,
        family="qwen2",
        windows=windows_of(raw, config),
        attention_bias=True,
        output_bias=False,
        mlp_bias=False,
    )


def windows_of(
    raw: RawConfig, config: ModelConfig, slides: Callable[[int, int], bool] = operator.ge
) -> tuple[int, ...]:
    """The windows of Qwen2 and Qwen3, if there are any: in the upper layers.

    Args:
        slides: whether a layer has one, from its index and `max_window_layers`.
    """
    sliding = raw.flag("use_sliding_window", False)
    first = raw.count("max_window_layers", default=28, minimum=0)
    if not sliding:  # the window counts for nothing then
        raw = RawConfig({**raw.values, "sliding_window": None}, raw.where)
    return raw.windows(config.num_layers, lambda index: sliding and slides(index, first))


QWEN2: Family = replace(llama.LLAMA, name="qwen2", read_config=read_config)
