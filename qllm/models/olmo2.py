"""OLMo 2 (Team OLMo 2024): norms behind attention and MLP alone, and of all queries and keys."""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig

DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5}


def read_config(raw: RawConfig) -> ModelConfig:
    return replace(
        llama.read_config(raw.with_defaults(DEFAULTS)),
        family="olmo2",
        mlp_bias=False,
        input_norms=False,
        output_norms=True,
        qk_norm=True,
        wide_qk_norm=True,
    )


_INNER = {k: v for k, v in llama.LLAMA.inner.items() if not k.endswith("norm")}

OLMO2: Family = replace(
    llama.LLAMA,
    name="olmo2",
    inner={
        **_INNER,
        "attention.qk_norm": ("self_attn.q_norm", "self_attn.k_norm"),
        "attention_output_norm": ("post_attention_layernorm",),
        "mlp_output_norm": ("post_feedforward_layernorm",),
    },
    read_config=read_config,
)
