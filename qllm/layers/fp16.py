"""The dense layer: weights in float16, bfloat16 or float32, as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qllm.config import QuantSpec
from qllm.layers.base import ALL_ROWS, Linear
from qllm.layers.sharding import narrow_runs


class DenseLinear(Linear):
    """A weight that is not quantized.

    Buffers: weight (N, K), bias (N,) or None, both in the type the layer computes in.
    """

    op = "dense_linear"
    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, spec: QuantSpec) -> None:
        super().__init__(weight.shape[1], weight.shape[0], spec)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, spec: QuantSpec, dtype: torch.dtype
    ) -> DenseLinear:
        weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
        return cls(weight, weight.new_empty(out_features) if bias else None, spec)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        *,
        input_range: float | None = None,
        all_fit: Callable[[bool], bool] = bool,
    ) -> DenseLinear:
        return cls(weight, bias, spec)

    def process_weights_after_loading(self) -> None:
        """Its kernels take the weight as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight, self.bias)

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        return self.weight[rows].float()

    def narrow(self, dim: int, *ranges: range) -> DenseLinear:
        bias = None if dim or self.bias is None else narrow_runs(self.bias, 0, ranges)
        return DenseLinear(narrow_runs(self.weight, dim, ranges), bias, self.spec)
