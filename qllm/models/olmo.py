"""OLMo (Groeneveld et al. 2024), the first one: Llama with LayerNorm that has no weights."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {"vocab_size": 50304, "eos_token_id": 50279}
EPS = 1e-5  # which no file says


def read_config(raw: RawConfig) -> ModelConfig:
    if raw.values.get("clip_qkv") is not None:
        expected = "null: QLLM clips no queries, keys and values, as OLMo 7B of 2024 does"
        raise raw.error("clip_qkv", raw.values["clip_qkv"], expected)
    return replace(
        llama.read_config(raw.with_defaults(DEFAULTS)),
        family="olmo",
        norm="layernorm",
        norm_eps=EPS,
        norm_affine=False,
        mlp_bias=False,
    )


OLMO: Family = replace(llama.LLAMA, name="olmo", read_config=read_config)
