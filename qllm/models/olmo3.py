"""OLMo 3 (Team OLMo 2025): OLMo 2 with windows in three of four layers.

Layers that see all tokens may have their RoPE stretched, those with a window do not.
"""

from __future__ import annotations

from dataclasses import replace

from qllm.config import ModelConfig
from qllm.models import olmo2
from qllm.models.family import Family, RawConfig
from qllm.models.rope import reach, read_ropes

THETA = 5e5


def read_config(raw: RawConfig) -> ModelConfig:
    raw = raw.with_defaults({"sliding_window": 4096})
    plain = {key: value for key, value in raw.values.items() if not key.startswith("rope_")}
    config = olmo2.read_config(RawConfig(plain, raw.where))
    windows = raw.windows(config.num_layers, lambda index: (index + 1) % 4 != 0)
    # A base outside is that of layers that see all alone, as in transformers.
    thetas = (raw.number("rope_theta", THETA), THETA)
    rope, window_rope = read_ropes(raw, config.trained_positions, (config.head_dim,) * 2, thetas)
    return replace(
        config,
        family="olmo3",
        windows=windows,
        rope=rope,
        window_rope=window_rope if windows else None,
        max_positions=reach(rope, config.trained_positions),
    )


OLMO3: Family = replace(olmo2.OLMO2, name="olmo3", read_config=read_config)
