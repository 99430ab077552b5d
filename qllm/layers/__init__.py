"""Linear layers, one file per scheme, and the table that names them."""

from __future__ import annotations

from qllm.config import QuantSpec
from qllm.layers.base import Linear
from qllm.layers.fp16 import DenseLinear
from qllm.layers.w8a8 import DynamicInt8Linear, StaticInt8Linear
from qllm.layers.weight_only import WeightOnlyLinear

LAYERS: dict[str, type[Linear]] = {
    "dense": DenseLinear,
    "weight_only": WeightOnlyLinear,
    "w8a8_dynamic": DynamicInt8Linear,
    "w8a8_static": StaticInt8Linear,
}


def linear_class(spec: QuantSpec) -> type[Linear]:
    """The layer that implements a spec."""
    return LAYERS[spec.kind]


__all__ = ["LAYERS", "DynamicInt8Linear", "Linear", "linear_class"]
