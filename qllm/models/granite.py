"""Granite 3 (IBM 2024): Llama with four factors, of embeddings, scores, blocks and logits."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig


def read_config(raw: RawConfig) -> ModelConfig:
    return replace(
        llama.read_config(raw),
        family="granite",
        embed_scale=raw.number("embedding_multiplier", 1.0),
        score_scale=raw.number("attention_multiplier", 1.0),
        output_scale=raw.number("residual_multiplier", 1.0),
        logit_divisor=raw.number("logits_scaling", 1.0),
    )


GRANITE: Family = replace(llama.LLAMA, name="granite", read_config=read_config)
