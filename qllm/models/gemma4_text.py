"""Gemma 4's language model (Google 2026): Gemma 3 with larger heads in layers that see all tokens.

Heads of these may have no matrix for values, which are then the keys in front of their norm; values
are normed as well, and what a layer puts out is multiplied by a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from qllm.config import LayerShape, ModelConfig
from qllm.models import gemma2, llama
from qllm.models.family import Family, RawConfig, check_groups
from qllm.models.rope import KINDS_OF_LAYERS, reach, read_ropes

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
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if raw.count(key, default=0, minimum=0):
            raise raw.error(key, raw.values[key], "0")
    if raw.flag("enable_moe_block", False):
        raise raw.error("enable_moe_block", True, "false")
    plain = {key: value for key, value in raw.values.items() if not key.startswith("rope_")}
    config = llama.read_config(RawConfig(plain, raw.where))
    windows = raw.windows(config.num_layers, lambda index: (index + 1) % EVERY != 0)
    windows = (*windows[:-1], 0) if any(windows[:-1]) else ()  # the last layer sees all tokens
    shapes = read_shapes(raw, config, windows or (0,) * config.num_layers)
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
        shapes=shapes,
        mlp_bias=False,
        activation=raw.text("hidden_activation", "gelu_pytorch_tanh"),
        qk_norm=True,
        value_norm=True,
        output_norms=True,
        layer_scales=True,
        embed_scale=math.sqrt(config.hidden_size),
        embed_scale_rounds=True,
        score_scale=1.0,
        windows=windows,
        rope=rope,
        window_rope=window_rope if windows else None,
        max_positions=reach(rope, config.trained_positions),
        logit_cap=gemma2.read_cap(raw, "final_logit_softcapping"),
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
    shapes: list[LayerShape] = []
    seen: dict[bool, LayerShape] = {}
    for index, window in enumerate(windows):
        values = of_layers.get(str(index), {})
        if not isinstance(values, Mapping) or set(values) - {HEAD_DIM, KV_HEADS}:
            raise raw.error(
                f"per_layer_config of {index}", values, f"an object with {HEAD_DIM} and {KV_HEADS}"
            )
        layer = RawConfig(values, f"{raw.where}: per_layer_config of {index}")
        shape = LayerShape(
            head_dim=layer.count(HEAD_DIM, default=config.head_dim),
            num_kv_heads=layer.count(KV_HEADS, default=config.num_kv_heads),
            intermediate_size=config.intermediate_size,
            values_are_keys=values_are_keys and not window,
        )
        check_groups(raw, config.num_heads, shape.num_kv_heads)
        first = seen.setdefault(bool(window), shape)
        if shape.head_dim != first.head_dim:
            raise layer.error(HEAD_DIM, shape.head_dim, f"{first.head_dim}, as in others like it")
        shapes.append(shape)
    return tuple(shapes)


GEMMA4_TEXT: Family = replace(
    gemma2.GEMMA2,
    name="gemma4_text",
    inner={
        **gemma2.GEMMA2.inner,
        "attention.qk_norm": ("self_attn.q_norm", "self_attn.k_norm"),
        "mlp_scale": ("layer_scalar",),
    },
    bare=("layer_scalar",),
    read_config=read_config,
)
