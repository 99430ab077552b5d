"""What to quantize and how (`quantization`), and a model's shape (`model`)."""

from __future__ import annotations

from qllm.config.model import (
    DeltaNetConfig,
    ExpertsConfig,
    LayerShape,
    ModelConfig,
    RopeConfig,
)
from qllm.config.quantization import (
    ACTIVATION_BITS,
    ALGORITHMS,
    BITWIDTHS,
    DEFAULT_ACTIVATION_BITS,
    DEFAULT_ALGORITHM,
    DEFAULT_GROUP_SIZE,
    DEFAULT_KV_BITS,
    DEFAULT_SCHEME,
    EMBEDDING,
    KV_BITS,
    LM_HEAD,
    MAX_SEED,
    SCHEMES,
    W8A8,
    QuantPlan,
    QuantSpec,
    read_plan_file,
)

__all__ = [
    "ACTIVATION_BITS",
    "ALGORITHMS",
    "BITWIDTHS",
    "DEFAULT_ACTIVATION_BITS",
    "DEFAULT_ALGORITHM",
    "DEFAULT_GROUP_SIZE",
    "DEFAULT_KV_BITS",
    "DEFAULT_SCHEME",
    "EMBEDDING",
    "KV_BITS",
    "LM_HEAD",
    "MAX_SEED",
    "SCHEMES",
    "W8A8",
    "DeltaNetConfig",
    "ExpertsConfig",
    "LayerShape",
    "ModelConfig",
    "QuantPlan",
    "QuantSpec",
    "RopeConfig",
    "read_plan_file",
]
