"""Norms of rows, in front of linears and behind sums, and of the heads of queries and keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import ModelConfig
from qllm.layers import DynamicInt8Linear
from qllm.ops.reference import Int8Rows


def add(x: Tensor, z: Tensor) -> Tensor:
    """x + z, of one shape."""
    return ops.on(x.device.type).add(x, z)


class Norm(nn.Module, ABC):
    """What norms of rows (N, C) share.

    Attributes:
        op: name of what computes it.
        options: that the op takes last.
        offset: what is added to the weight.
    """

    op: str
    weight: Tensor
    bias: Tensor | None
    options: tuple[float | Tensor | None, ...]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape, self.options = (config.hidden_size,), (config.norm_eps,)
        self.offset = config.norm_offset

    def round_for(self, linear: DynamicInt8Linear) -> None:
        """Return `Int8Rows` from now on, as a linear, which alone takes them, would make them."""
        self.op += "_int8"
        self.options += (linear.input_scale,)

    def round_no_more(self) -> None:
        """Undo `round_for`: what stands behind the norm now takes rows as they are."""
        if self.op != type(self).op:
            self.op, self.options = type(self).op, self.options[:-1]

    def divide(self, scales: Tensor) -> None:
        """Divide what the norm gives by `scales` (C,)."""
        # The whole weight: a half type would lose digits of a small one that is less its offset.
        weight = (self.weight.float() + self.offset) / scales
        self.weight, self.offset = weight.to(self.weight.dtype), 0.0
        bias = getattr(self, "bias", None)
        if bias is not None:
            self.bias = (bias / scales).to(bias.dtype)

    def stored(self, offset: float) -> dict[str, Tensor]:
        """Its tensors, of which the weight is less an offset."""
        tensors = dict(self.named_buffers())
        return tensors | ({"weight": self.weight + (self.offset - offset)} if tensors else {})

    @property
    def _last(self) -> tuple[object, ...]:
        return (*self.options, self.offset) if self.offset else self.options

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the op takes behind x."""

    def forward(self, x: Tensor) -> Tensor | Int8Rows:
        return getattr(ops.on(x.device.type), self.op)(x, *self.tensors, *self._last)

    def after_sum(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor | Int8Rows]:
        """x + z and its norm, in one launch where the device has that."""
        if fused := ops.on(x.device.type).add_norm.get(self.op):
            return fused(x, z, *self.tensors, *self._last)
        x = add(x, z)
        return x, self(x)


class LayerNorm(Norm):
    """Mean and variance to 0 and 1, then weight (C,) and bias (C,), where there are any."""

    op = "layer_norm"

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config)
        for name in ("weight", "bias"):
            value = torch.empty(self.shape, dtype=dtype, device="meta")
            there = config.norm_affine and (name == "weight" or config.norm_bias)
            self.register_buffer(name, value if there else None)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias


class RMSNorm(Norm):
    """Root mean square to 1, then weight (C,) (Zhang and Sennrich 2019)."""

    op = "rms_norm"

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.register_buffer("weight", torch.empty(self.shape, dtype=dtype, device="meta"))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.weight,)


NORMS: dict[str, Callable[[ModelConfig, torch.dtype], Norm]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
}


class NoNorm(nn.Module):
    """What stands where a layer has no norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def after_sum(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x + z, and the same once more."""
        x = add(x, z)
        return x, x


class QKNorm(nn.Module):
    """Weights of the norms that each head's query and key have: (2 D,), of queries, of keys.

    Attributes:
        values: each head's value is normed as well, by no weight.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.offset, self.values = config.norm_eps, config.norm_offset, config.value_norm
        weight = torch.empty(2 * config.head_dim, dtype=dtype, device="meta")
        self.register_buffer("weight", weight)

    def forward(self, qkv: Tensor, heads: Sequence[int]) -> Tensor:
        options = (*heads[:2], self.eps, self.offset, self.values)
        return ops.on(qkv.device.type).qk_norm(qkv, self.weight, *options)


class HeadNorm(nn.Module):
    """Weight of an RMS norm that each head has: (D,)."""

    weight: Tensor

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, offset: float = 0.0) -> None:
        super().__init__()
        self.options = (eps, offset) if offset else (eps,)
        self.register_buffer("weight", torch.empty(dim, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, len(self.weight))
        return ops.on(x.device.type).rms_norm(rows, self.weight, *self.options).view(x.shape)


class WideQKNorm(nn.Module):
    """Weights of the norm of a token's queries, and of its keys, of all heads together.

    Buffer: weight ((H + H_kv) D,).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.columns = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads)]
        weight = torch.empty(sum(self.columns), dtype=dtype, device="meta")
        self.register_buffer("weight", weight)

    def forward(self, qkv: Tensor) -> Tensor:
        options = (*self.columns, self.eps, self.offset)
        return ops.on(qkv.device.type).wide_qk_norm(qkv, self.weight, *options)
