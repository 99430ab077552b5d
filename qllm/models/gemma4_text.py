"""Gemma 4's language model (Google 2026): Gemma 3 with larger heads in layers that see all tokens.

Heads of these may have no matrix for values, which are then the keys in front of their norm; values
are normed as well, and what a layer puts out is multiplied by a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from qllm.config import ExpertsConfig, LayerShape, ModelConfig
from qllm.models import gemma2, llama
from qllm.models.family import MAX_EXPERTS, Family, RawConfig, check_groups
from qllm.models.rope import KINDS_OF_LAYERS, reach, read_ropes
from qllm.models.stacks import stacks_of

DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
GLOBAL_HEAD_DIM = 512
# One layer of six sees all tokens, where no layer_types say it.
EVERY = 6
THETAS = 1e6, 1e4
ROPES = dict(
    zip(
        KINDS_OF_LAYERS,
        ({"rope_type": "proportional", "partial_rotary_factor": 0.25}, {"rope_type": "default"}),
        strict=True,
    )
)
# What layers may have of their own in transformers' `per_layer_config`.
HEAD_DIM, KV_HEADS = "head_dim", "num_key_value_heads"


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    if raw.values.get("use_bidirectional_attention") not in (None, "vision"):
        value = raw.values["use_bidirectional_attention"]
        raise raw.error("use_bidirectional_attention", value, 'null or "vision"')
    plain = {key: value for key, value in raw.values.items() if not key.startswith("rope_")}
    config = llama.read_config(RawConfig(plain, raw.where))
    windows = raw.windows(config.num_layers, lambda index: (index + 1) % EVERY != 0)
    windows = (*windows[:-1], 0) if any(windows[:-1]) else ()  # the last layer sees all tokens
    shapes = read_shapes(raw, config, windows or (0,) * config.num_layers)
    inputs = raw.count("hidden_size_per_layer_input", default=256, minimum=0)
    rows = raw.count("vocab_size_per_layer_input", default=DEFAULTS["vocab_size"])
    if inputs and rows < config.vocab_size:
        raise raw.error("vocab_size_per_layer_input", rows, f"{config.vocab_size} or more")
    of_windows = shapes[next((i for i, window in enumerate(windows) if window), -1)]
    rope, window_rope = read_ropes(
        RawConfig({"rope_parameters": raw.values.get("rope_parameters") or ROPES}, raw.where),
        config.trained_positions,
        (shapes[-1].head_dim, of_windows.head_dim),
        THETAS,
    )
    return replace(
        config,
        family="gemma4_text",
        head_dim=max(shape.head_dim for shape in shapes),
        num_kv_heads=max(shape.num_kv_heads for shape in shapes),
        intermediate_size=max(shape.intermediate_size for shape in shapes),
        shapes=shapes,
        mlp_bias=False,
        activation=raw.text("hidden_activation", "gelu_pytorch_tanh"),
        qk_norm=True,
        value_norm=True,
        output_norms=True,
        layer_scales=True,
        experts=read_experts(raw, config),
        layer_inputs=inputs,
        layer_input_rows=rows if inputs else 0,
        embed_scale=math.sqrt(config.hidden_size),
        embed_scale_rounds=True,
        score_scale=1.0,
        windows=windows,
        rope=rope,
        window_rope=window_rope if windows else None,
        max_positions=reach(rope, config.trained_positions),
        logit_cap=gemma2.read_cap(raw, "final_logit_softcapping"),
    )


def read_experts(raw: RawConfig, config: ModelConfig) -> ExpertsConfig | None:
    """The experts beside the MLP of each layer; None: there are none."""
    if not raw.flag("enable_moe_block", False):
        return None
    if raw.flag("use_double_wide_mlp", False) and raw.values.get("num_kv_shared_layers"):
        raise raw.error("use_double_wide_mlp", True, "false where there are experts")
    count = raw.count("num_experts", maximum=MAX_EXPERTS)
    return ExpertsConfig(
        count=count,
        top_k=raw.count("top_k_experts", maximum=count),
        intermediate_size=raw.count("moe_intermediate_size"),
        normalizes=True,
        layers=(True,) * config.num_layers,
        shared_size=config.intermediate_size,
        apart=True,
    )


def read_shapes(
    raw: RawConfig, config: ModelConfig, windows: tuple[int, ...]
) -> tuple[LayerShape, ...]:
    """Sizes of each layer: those that see all tokens have heads of their own.

    Args:
        config: what the others have.
        windows: of each layer, 0 where it has none.

    Raises:
        UserError: for sizes that cannot be, or differ in layers that see as much.
    """
    values_are_keys = raw.flag("attention_k_eq_v", False)
    own = {HEAD_DIM: raw.count("global_head_dim", default=GLOBAL_HEAD_DIM)}
    if values_are_keys and raw.values.get("num_global_key_value_heads") is not None:
        own[KV_HEADS] = raw.count("num_global_key_value_heads")
    of_layers = raw.values.get("per_layer_config")
    if of_layers is None:
        of_layers = {str(index): own for index, window in enumerate(windows) if not window}
    if not isinstance(of_layers, Mapping):
        raise raw.error("per_layer_config", of_layers, "an object with what layers have of it")
    shared = raw.count("num_kv_shared_layers", default=0, minimum=0)
    if shared >= len(windows):
        raise raw.error("num_kv_shared_layers", shared, f"fewer than the {len(windows)} layers")
    first_shared = len(windows) - shared
    # The last layer of each kind in front of those.
    sources = {bool(window): index for index, window in enumerate(windows[:first_shared])}
    if unknown := {bool(window) for window in windows} - sources.keys():
        raise raw.error(
            "num_kv_shared_layers",
            shared,
            f"fewer: none of the first {first_shared} layers is of the kind "
            f"{KINDS_OF_LAYERS[unknown.pop()]}",
        )
    twice = raw.flag("use_double_wide_mlp", False)
    shapes: list[LayerShape] = []
    seen: dict[bool, LayerShape] = {}
    for index, window in enumerate(windows):
        values, sharing = of_layers.get(str(index), {}), index >= first_shared
        if not isinstance(values, Mapping) or set(values) - {HEAD_DIM, KV_HEADS}:
            raise raw.error(
                f"per_layer_config of {index}", values, f"an object with {HEAD_DIM} and {KV_HEADS}"
            )
        layer = RawConfig(values, f"{raw.where}: per_layer_config of {index}")
        shape = LayerShape(
            head_dim=layer.count(HEAD_DIM, default=config.head_dim),
            num_kv_heads=layer.count(KV_HEADS, default=config.num_kv_heads),
            intermediate_size=config.intermediate_size * (2 if twice and sharing else 1),
            values_are_keys=values_are_keys and not window and not sharing,
            kv_layer=sources[bool(window)] if sharing else None,
            shares_kv=shared > 0 and index in sources.values(),
        )
        check_groups(raw, config.num_heads, shape.num_kv_heads)
        first = seen.setdefault(bool(window), shape)
        for key, own_size, size in (
            (HEAD_DIM, shape.head_dim, first.head_dim),
            (KV_HEADS, shape.num_kv_heads, first.num_kv_heads),
        ):
            if own_size != size:
                raise layer.error(key, own_size, f"{size}, as in others that see as much")
        shapes.append(shape)
    return tuple(shapes)


EXPERTS = {
    "mlp.router": ("router.proj",),
    "mlp.router_norm": ("router.scale",),
    "mlp.expert_scales": ("router.per_expert_scale",),
    "mlp.experts_norm": ("pre_feedforward_layernorm_2",),
    "mlp.experts.{}.up": ("experts.{}.gate_proj", "experts.{}.up_proj"),
    "mlp.experts.{}.down": ("experts.{}.down_proj",),
    "mlp.experts_output_norm": ("post_feedforward_layernorm_2",),
    "mlp.shared_norm": ("pre_feedforward_layernorm",),
    "mlp.shared.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared.down": ("mlp.down_proj",),
    "mlp.shared_output_norm": ("post_feedforward_layernorm_1",),
}
GEMMA4_TEXT: Family = replace(
    gemma2.GEMMA2,
    name="gemma4_text",
    inner={
        **gemma2.GEMMA2.inner,
        "attention.qk_norm": ("self_attn.q_norm", "self_attn.k_norm"),
        **EXPERTS,
        "mlp_scale": ("layer_scalar",),
        "mlp_input_gate": ("per_layer_input_gate",),
        "mlp_input_out": ("per_layer_projection",),
        "mlp_input_norm": ("post_per_layer_input_norm",),
    },
    outer={
        **gemma2.GEMMA2.outer,
        "layer_inputs.embed": "embed_tokens_per_layer",
        "layer_inputs.projection": "per_layer_model_projection",
        "layer_inputs.norm": "per_layer_projection_norm",
    },
    bare=("layer_scalar", "router.scale", "router.per_expert_scale"),
    stacks=stacks_of(EXPERTS, ""),
    read_config=read_config,
)
