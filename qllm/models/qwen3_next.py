"""Qwen3-Next and Qwen3.5 (Qwen Team 2025, 2026): gated delta nets, and gated attention between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qllm.config import DeltaNetConfig, ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig
from qllm.models.qwen2_moe import QWEN2_MOE, read_experts
from qllm.models.qwen3 import QWEN3

KINDS = ("full_attention", "linear_attention")
SILU = ("silu", "swish")
ROTARY = 0.25  # of a head, where a config.json does not say

QWEN3_NEXT_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "norm_topk_prob": True,
}
QWEN3_5_DEFAULTS = QWEN3_NEXT_DEFAULTS | {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
QWEN3_5_MOE_DEFAULTS = QWEN3_5_DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 512,  # which no layer has
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
}
# All of its layers have experts, whose weights are divided by their sum, whatever config.json says.
QWEN3_5_MOE_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


def hybrid_config(raw: RawConfig, family: str, defaults: Mapping[str, Any]) -> ModelConfig:
    """What all of them share: every fourth layer has attention."""
    raw = raw.with_defaults(defaults)
    config = llama.read_config(raw, partial=ROTARY)
    return replace(
        config,
        family=family,
        mlp_bias=False,
        norm_offset=1.0,
        qk_norm=True,
        attention_gate=True,
        delta_net=read_delta_net(raw, config),
    )


def read_delta_net(raw: RawConfig, config: ModelConfig) -> DeltaNetConfig | None:
    """The delta nets of a model's layers; None: none has any.

    Raises:
        UserError: for values that cannot be.
    """
    count = config.num_layers
    kinds = raw.values.get("layer_types")
    if kinds is None:
        every = raw.count("full_attention_interval", default=4)
        kinds = [KINDS[(i + 1) % every != 0] for i in range(count)]
    unknown = not isinstance(kinds, list) or any(kind not in KINDS for kind in kinds)
    if unknown or len(kinds) < count:
        raise raw.error("layer_types", kinds, f"a list of {count} of {' and '.join(KINDS)}")
    layers = tuple(kind == KINDS[1] for kind in kinds[:count])
    key_heads = raw.count("linear_num_key_heads", default=16)
    value_heads = raw.count("linear_num_value_heads", default=32)
    if value_heads % key_heads:
        expected = f"a multiple of {key_heads}, the heads of keys"
        raise raw.error("linear_num_value_heads", value_heads, expected)
    if any(layers) and config.activation not in SILU:
        expected = "silu, which convolutions have here"
        raise raw.error("hidden_act", config.activation, expected)
    found = DeltaNetConfig(
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=raw.count("linear_key_head_dim", default=128),
        value_dim=raw.count("linear_value_head_dim", default=128),
        kernel=raw.count("linear_conv_kernel_dim", default=4),
        layers=layers,
    )
    return found if any(layers) else None


def read_qwen3_next(raw: RawConfig) -> ModelConfig:
    return _with_experts(raw, "qwen3_next", QWEN3_NEXT_DEFAULTS, (512, 10))


def read_qwen3_5(raw: RawConfig) -> ModelConfig:
    return hybrid_config(raw, "qwen3_5_text", QWEN3_5_DEFAULTS)


def read_qwen3_5_moe(raw: RawConfig) -> ModelConfig:
    raw = replace(raw, values={**raw.values, **QWEN3_5_MOE_EXPERTS})
    return _with_experts(raw, "qwen3_5_moe_text", QWEN3_5_MOE_DEFAULTS, (256, 8))


def _with_experts(
    raw: RawConfig, family: str, defaults: Mapping[str, Any], counts: tuple[int, int]
) -> ModelConfig:
    config, raw = hybrid_config(raw, family, defaults), raw.with_defaults(defaults)
    shared = raw.count("shared_expert_intermediate_size", default=512)
    experts = read_experts(raw, config, counts=counts, inner=512, shared=shared)
    return replace(config, experts=experts)


def _grouped(config: ModelConfig, *sizes: int) -> Tensor:
    """The row of a matrix of rows (key head, part, …) that each of (part, key head, …) is.

    Args:
        sizes: rows of each part, of one key head.
    """
    assert config.delta_net is not None  # as of all layers that ask for it
    heads = config.delta_net.key_heads
    rows = torch.arange(heads * sum(sizes)).view(heads, -1)
    return torch.cat([part.flatten() for part in rows.split(list(sizes), dim=1)])


def _qkv_order(config: ModelConfig) -> Tensor:
    delta = config.delta_net
    assert delta is not None
    values = delta.value_heads // delta.key_heads * delta.value_dim
    return _grouped(config, delta.key_dim, delta.key_dim, values, values)


def _gates_order(config: ModelConfig) -> Tensor:
    delta = config.delta_net
    assert delta is not None
    each = delta.value_heads // delta.key_heads
    return _grouped(config, each, each)


_DELTA = {
    "attention.qkv": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "attention.gates": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    "attention.conv": ("linear_attn.conv1d",),
    "attention.log_decay": ("linear_attn.A_log",),
    "attention.decay_bias": ("linear_attn.dt_bias",),
    "attention.norm": ("linear_attn.norm",),
    "attention.out": ("linear_attn.out_proj",),
}

QWEN3_5: Family = replace(
    QWEN3, name="qwen3_5_text", delta=_DELTA, bare=(".A_log", ".dt_bias"), read_config=read_qwen3_5
)
QWEN3_5_MOE: Family = replace(
    QWEN3_5,
    name="qwen3_5_moe_text",
    inner={**QWEN2_MOE.inner, **QWEN3.inner},
    read_config=read_qwen3_5_moe,
    stacks=QWEN2_MOE.stacks,
)
QWEN3_NEXT: Family = replace(
    QWEN3_5_MOE,
    name="qwen3_next",
    delta=_DELTA
    | {
        "attention.qkv": ("linear_attn.in_proj_qkvz",),
        "attention.gates": ("linear_attn.in_proj_ba",),
    },
    delta_orders={"attention.qkv": _qkv_order, "attention.gates": _gates_order},
    read_config=read_qwen3_next,
)
