"""EXAONE 4.0 (LG AI Research 2025): norms behind attention and MLP, and of each query and key.

Where some layers have a window, those that see all tokens know nothing of positions.
"""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import llama, olmo2
from qllm.models.family import Family, RawConfig

DEFAULTS = {
    "vocab_size": 102400,
    "intermediate_size": 16384,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "eos_token_id": 2,
}


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults(DEFAULTS)
    config, hybrid = llama.read_config(raw), raw.values["sliding_window"] is not None

    def slides(index: int) -> bool:
        return hybrid and (index + 1) % raw.count("sliding_window_pattern", default=4) != 0

    windows = raw.windows(config.num_layers, slides)
    rotated = tuple(window > 0 for window in windows) or (False,) * config.num_layers
    return replace(
        config,
        family="exaone4",
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        input_norms=False,
        output_norms=True,
        qk_norm=True,
        windows=windows,
        rope_layers=rotated if hybrid and not all(rotated) else (),
    )


EXAONE4: Family = replace(olmo2.OLMO2, name="exaone4", read_config=read_config)
