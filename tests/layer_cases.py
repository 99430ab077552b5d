"""Layers of every bitwidth, group size and scheme, made of random weights."""

from __future__ import annotations

import torch

from qllm.config import BITWIDTHS, SCHEMES, W8A8, QuantSpec
from qllm.layers import linear_class
from qllm.layers.base import describe

SPECS = list(
    dict.fromkeys(
        QuantSpec.parse(bitwidth, group_size, scheme)
        for bitwidth in BITWIDTHS
        for group_size in (-1, 20, 128)
        for scheme in SCHEMES
    )
)
W8A8_SPECS = [spec for spec in SPECS if spec.kind in W8A8.values()]
RANGE = 4.0  # of the inputs, for the scheme that takes it from a calibration


def spec_id(spec: QuantSpec) -> str:
    return describe(spec).replace(" ", "-")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(spec, rows=24, columns=67, *, dtype=torch.float32, bias=True, input_range=RANGE):
    """A layer, and the weight and bias it was made of."""
    weight = normal(rows, columns, dtype=dtype) * 0.05
    b = normal(rows, seed=1, dtype=dtype) if bias else None
    layer = linear_class(spec).from_float(
        weight.clone(), None if b is None else b.clone(), spec, input_range=input_range
    )
    return layer, weight, b


def processed(layer):
    """The layer, in its kernel's layout."""
    layer.process_weights_after_loading()
    return layer
