"""int8 weights times int8 activations, summed in int32 (SmoothQuant, Xiao et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.layers.base import ALL_ROWS, QuantizedLinear
from qllm.layers.sharding import narrow_runs
from qllm.quant.packing import PackedWeight, pack, packed_size, unpack
from qllm.quant.rtn import quantize_rtn


class DynamicInt8Linear(QuantizedLinear):
    """`8:tc-li`: activations are quantized with one scale per token, found as they come.

    Buffers until a kernel takes them, for N output and K input channels:

        qweight  int8 (N, K), symmetric
        scales   float16 (float32 where that over- or underflows)  (N,)
        bias     (N,) or None
    """

    op = "int8_linear"
    qweight: Tensor
    scales: Tensor
    input_scale: Tensor | None

    def __init__(
        self, qweight: Tensor, scales: Tensor, bias: Tensor | None, spec: QuantSpec
    ) -> None:
        super().__init__(qweight.shape[1], qweight.shape[0], spec)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", None)

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
        all_fit: Callable[[bool], bool] = bool,
    ) -> DynamicInt8Linear:
        return cls(*_quantize_channels(weight, all_fit), bias, spec)

    @property
    def tensors(self) -> PackedWeight:
        if self.layout:
            return PackedWeight(self.qweight, self.scales, self.qweight.new_empty(0))
        # q + 128 in uint8 is the symmetric grid of 8 bits, whose zero is 128.
        values = self.qweight.view(torch.uint8) ^ 128
        return PackedWeight(pack(values, 8), self.scales[:, None], values.new_empty(0))

    @tensors.setter
    def tensors(self, packed: PackedWeight) -> None:
        self.qweight, self.scales = packed.qweight, packed.scales

    def _packed_shapes(self) -> PackedWeight:
        rows = self.out_features, packed_size(self.in_features, 8)
        qweight = torch.empty(rows, dtype=torch.uint8, device="meta")
        return PackedWeight(qweight, self.scales[:, None], qweight.new_empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(
            x, self.qweight, self.scales, self.bias, self.input_scale, self.out_features
        )

    def dequantize(self, rows: slice = ALL_ROWS) -> Tensor:
        qweight, scales = self.integers
        return qweight[rows].float() * scales[rows].float()[:, None]

    def narrow(self, dim: int, *ranges: range) -> DynamicInt8Linear:
        """See `Linear.narrow`; of some input channels, each token gets a scale of its own."""
        qweight, scales = self.integers
        qweight = narrow_runs(qweight, dim, ranges)
        bias = None
        if dim == 0:
            scales = narrow_runs(scales, 0, ranges)
            bias = None if self.bias is None else narrow_runs(self.bias, 0, ranges)
        scale = () if self.input_scale is None else (self.input_scale,)
        return type(self)(qweight, scales, bias, self.spec, *scale)

    def stored(self) -> dict[str, Tensor]:
        return dict(zip(("qweight", "scales"), self.integers, strict=True))

    @property
    def integers(self) -> tuple[Tensor, Tensor]:
        """int8 (N, K) and scales (N,), as checkpoints have them."""
        if not self.layout:
            return self.qweight, self.scales
        packed = self.packed
        return _signed(packed.qweight, self.in_features), packed.scales[:, 0]


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
        self.input_scale = input_scale

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        *,
        input_range: float | None = None,
        all_fit: Callable[[bool], bool] = bool,
    ) -> StaticInt8Linear:
        if input_range is None:
            raise UserError(
                "8:tc needs the activation ranges of a calibration; "
                "make one with fake_calib_gen.py, or use 8:tc-li"
            )
        scale = torch.tensor(input_range * 2 / 255, dtype=torch.float32, device=weight.device)
        # Zero as float32 stores it: a range may be too small for its scale to be told from it.
        scale = torch.where(scale == 0, 1.0, scale)
        return cls(*_quantize_channels(weight, all_fit), bias, spec, scale)


def _signed(packed: Tensor, in_features: int) -> Tensor:
    """Rows of 8-bit values of the symmetric grid as int8 (N, K)."""
    # q - 128 in uint8 wraps to the two's complement of the signed value.
    return unpack(packed, 8, in_features).sub(128).view(torch.int8).contiguous()


def _quantize_channels(weight: Tensor, all_fit: Callable[[bool], bool]) -> tuple[Tensor, Tensor]:
    """(N, K) to int8 (N, K) and scales (N,): the symmetric 8-bit grid, its zero taken off."""
    packed, scales, *_ = quantize_rtn(weight, 8, -1, "sym", all_fit=all_fit)
    return _signed(packed, weight.shape[1]), scales[:, 0]
