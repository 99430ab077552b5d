"""int8 weights times int8 activations, summed in int32 (SmoothQuant, Xiao et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.layers.base import ALL_ROWS, Linear
from qllm.ops.reference import quantize_int8, quantize_per_token, scale_int32
from qllm.quant.packing import unpack
from qllm.quant.rtn import quantize_rtn


class DynamicInt8Linear(Linear):
    """`8:tc-li`: activations are quantized with one scale per token, found as they come.

    Buffers, for N output and K input channels:

        qweight  int8 (N, K), symmetric
        scales   float16 (float32 where that over- or underflows)  (N,)
        bias     (N,) or None
    """

    op = "int8_matmul"

    def __init__(
        self, qweight: Tensor, scales: Tensor, bias: Tensor | None, spec: QuantSpec
    ) -> None:
        super().__init__(qweight.shape[1], qweight.shape[0], spec)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, spec: QuantSpec, dtype: torch.dtype
    ) -> DynamicInt8Linear:
        qweight = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        scales = qweight.new_empty(out_features, dtype=torch.float16)
        return cls(
            qweight, scales, qweight.new_empty(out_features, dtype=dtype) if bias else None, spec
        )

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        *,
        input_range: float | None = None,
    ) -> DynamicInt8Linear:
        return cls(*_quantize_channels(weight), bias, spec)

    def forward(self, x: Tensor) -> Tensor:
        q, x_scales = quantize_per_token(x)
        total = self.run(q, self.qweight)
        return scale_int32(total, x_scales, self.scales, self.bias, x.dtype)

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        return self.qweight[rows].float() * self.scales[rows].float()[:, None]


class StaticInt8Linear(DynamicInt8Linear):
    """`8:tc`: one activation scale for the whole tensor, found in calibration.

    Buffers: those of `DynamicInt8Linear`, and

        input_scale  float32 ()
    """

    def __init__(
        self,
        qweight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        input_scale: Tensor | None = None,
    ) -> None:
        super().__init__(qweight, scales, bias, spec)
        if input_scale is None:
            input_scale = qweight.new_empty((), dtype=torch.float32)
        self.register_buffer("input_scale", input_scale)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        *,
        input_range: float | None = None,
    ) -> StaticInt8Linear:
        if input_range is None:
            raise UserError(
                "8:tc needs the activation ranges of a calibration; "
                "make one with fake_calib_gen.py, or use 8:tc-li"
            )
        scale = torch.tensor(input_range * 2 / 255, dtype=torch.float32, device=weight.device)
        # Zero as float32 stores it: a range may be too small for its scale to be told from it.
        scale = torch.where(scale == 0, 1.0, scale)
        return cls(*_quantize_channels(weight), bias, spec, scale)

    def forward(self, x: Tensor) -> Tensor:
        total = self.run(quantize_int8(x, self.input_scale), self.qweight)
        return scale_int32(total, self.input_scale, self.scales, self.bias, x.dtype)


def _quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) to int8 (N, K) and scales (N,): the symmetric 8-bit grid, its zero taken off."""
    packed, scales, *_ = quantize_rtn(weight, 8, -1, "sym")
    # q - 128 in uint8 wraps to the two's complement of the signed value.
    return unpack(packed, 8, weight.shape[1]).sub_(128).view(torch.int8).contiguous(), scales[:, 0]
