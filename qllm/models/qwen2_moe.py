"""Qwen1.5-MoE and Qwen2-MoE (Yang et al. 2024): many experts, and one that all tokens take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qllm.config import ExpertsConfig, ModelConfig
from qllm.models import llama
from qllm.models.family import Family, RawConfig, read_top_k
from qllm.models.qwen2 import windows_of
from qllm.models.stacks import stacks_of

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 32768,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 24,
    "sliding_window": 4096,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config = llama.read_config(raw)
    windows = windows_of(raw, config, lambda index, first: index < first and index % 2 == 0)
    return replace(
        config,
        family="qwen2_moe",
        windows=windows,
        attention_bias=raw.flag("qkv_bias", True),
        output_bias=False,
        mlp_bias=False,
        experts=read_experts(
            raw,
            config,
            counts=(60, 4),
            inner=1408,
            shared=raw.count("shared_expert_intermediate_size", default=5632),
        ),
    )


def read_experts(
    raw: RawConfig, config: ModelConfig, *, counts: tuple[int, int], inner: int, shared: int
) -> ExpertsConfig | None:
    """The experts of Qwen's models, and the layers that have them; None: none has.

    Args:
        counts: how many experts there are, and a token takes, where a config.json does not say.
        inner: inner channels of each, likewise.
        shared: those of the one that all tokens take; 0: there is none.
    """
    count, top_k = read_top_k(raw, ("num_experts", "num_local_experts"), *counts)
    step = raw.count("decoder_sparse_step", default=1)
    dense = raw.values.get("mlp_only_layers") or []
    if not isinstance(dense, Sequence) or not all(isinstance(index, int) for index in dense):
        raise raw.error("mlp_only_layers", dense, "a list of layers")
    layers = tuple(i not in dense and (i + 1) % step == 0 for i in range(config.num_layers))
    found = ExpertsConfig(
        count=count,
        top_k=top_k,
        intermediate_size=raw.count("moe_intermediate_size", default=inner),
        normalizes=raw.flag("norm_topk_prob", False),
        shared_size=shared,
        layers=layers,
    )
    return found if any(layers) else None


_EXPERT = "mlp.experts.{}."

EXPERTS = {
    "mlp.router": ("mlp.gate",),
    "mlp.experts.{}.up": (f"{_EXPERT}gate_proj", f"{_EXPERT}up_proj"),
    "mlp.experts.{}.down": (f"{_EXPERT}down_proj",),
}
STACKS = stacks_of(EXPERTS, "mlp.")

QWEN2_MOE: Family = replace(
    llama.LLAMA,
    name="qwen2_moe",
    inner={
        **llama.LLAMA.inner,
        **EXPERTS,
        "mlp.shared.up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        "mlp.shared.down": ("mlp.shared_expert.down_proj",),
        "mlp.shared_gate": ("mlp.shared_expert_gate",),
    },
    read_config=read_config,
    stacks=STACKS,
)
