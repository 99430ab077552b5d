"""The GPU kernels on a GPU, or on the CPU in Triton's interpreter: see the fixture `gpu`."""

from __future__ import annotations

from cpu_paths import Weight
from torch import Tensor

from qllm.ops.gpu import layout, linear
from qllm.quant.packing import PackedWeight


def packed(weight: Weight, device: str) -> PackedWeight:
    """A weight in the kernels' layout, made on the device."""
    stored = PackedWeight(*(tensor.to(device) for tensor in weight.stored[:3]))
    request = weight.request
    return layout.pack(stored, request.bits, request.group_size, request.in_features)


def multiply(weight: Weight, x: Tensor, bias: Tensor | None, device: str) -> Tensor:
    """x (M, K) times a weight, plus bias."""
    tensors = packed(weight, device)[:3]
    bias = None if bias is None else bias.to(device)
    request = weight.request
    format_ = (request.out_features, request.bits, request.group_size)
    return linear.weight_only_linear(x.to(device), *tensors, bias, *format_).cpu()
