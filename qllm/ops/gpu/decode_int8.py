"""The product of a few rows with an int8 weight, both int8, in CUDA C++.

Its sums are exact: which of the kernels runs changes no bit.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import cuda, decode, driver, nvrtc
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.layout import BLOCK, PANEL
from qllm.ops.reference import Int8Rows

ALIGNED = 16  # inputs that are loaded at once
FEW_ROWS = 8 * cuda.TILES[-1]  # which one block of threads takes, so that the weight is read once


class Variant(NamedTuple):
    """The constants of the kernel; see decode_int8.cu."""

    float16: bool
    wide: bool
    warps: int
    depth: int
    tiles: int
    panels: int
    whole: bool


class Arguments(ctypes.Structure):
    """The kernel's, as in decode_int8.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "q", "x_scales", "scales", "bias", "y")),
        *((name, ctypes.c_int) for name in ("rows", "inputs", "outputs", "blocks")),
        *((name, ctypes.c_int) for name in ("x_scales_stride", "prefetched")),
    )


@device_of.once
def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot run on a device, where Triton's product does, as a note says; else None."""
    if device.type != "cuda":
        return "it is for CUDA devices"
    instead = "few rows of int8 take Triton's product"
    test = partial(_self_test, device)
    return device_of.failure("decode_int8", device, test, instead, nvrtc.version)


def about(device: torch.device) -> str:
    """What multiplies few rows, for `--explain`."""
    if reason := unsupported_reason(device):
        return f"few rows too, not in CUDA C++: {reason}"
    return f"up to {FEW_ROWS} rows in CUDA C++{decode.order(device)}"


def takes(rows: Int8Rows, qweight: Tensor) -> bool:
    """Whether it multiplies such rows with such a weight."""
    aligned = all(
        part.is_contiguous() and part.data_ptr() % ALIGNED == 0 for part in (rows.values, qweight)
    )
    return (
        0 < len(rows.values) <= FEW_ROWS
        and rows.dtype in cuda.DTYPES
        and qweight.shape[1] % ALIGNED == 0
        and aligned
    )


def int8_linear(rows: Int8Rows, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.int8_linear` for what it `takes`."""
    x, x_scales, dtype = rows
    (count, inputs), outputs = x.shape, len(qweight)
    y = x.new_empty(count, outputs, dtype=dtype)
    architecture, num_sms = device_of.architecture(x.device)
    panels, blocks = -(-outputs // PANEL), -(-inputs // BLOCK)
    cut = cuda.cut("decode-int8", architecture, count, panels, blocks, num_sms)
    wide = scales.dtype == torch.float32
    variant = Variant(dtype == torch.float16, wide, *cut[:4], whole=inputs % BLOCK == 0)
    x_scales, scales = x_scales.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    early = decode.begins_early(x.device)
    arguments = Arguments(
        x.data_ptr(),
        qweight.data_ptr(),
        x_scales.data_ptr(),
        scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        count,
        inputs,
        outputs,
        blocks,
        int(x_scales.dim() > 0),
        (cut.prefetched << 10) // PANEL if early else 0,
    )
    with device_of.current(x):
        function = cuda.kernel("decode_int8", variant, x.device)
        grid = (1, -(-panels // cut.panels))
        driver.launch(function, grid, 32 * cut.warps, arguments, x.device, early=early)
    return y


def _self_test(device: torch.device) -> str | None:
    """Products of what is exact and what has to be rounded, beside the reference's."""
    outputs, most = 5 * PANEL + 3, 5 * BLOCK + 48
    integers = (torch.arange(outputs * most) * 2654435761 % 256 - 128).view(outputs, most)
    scales = (torch.arange(outputs).remainder(7) + 1).div(999).half()
    x = (torch.arange(FEW_ROWS * most) * 40503 % 65536 - 32768).view(FEW_ROWS, most) / 999
    cases = ((torch.bfloat16, None, 5 * BLOCK), (torch.float16, scales - 0.003, most))
    for dtype, bias, inputs in cases:
        q = integers[:, :inputs].to(torch.int8).contiguous()
        rows = reference.quantize_rows(x[:, :inputs].to(dtype), None)
        wanted = reference.int8_linear(rows, q, scales, bias, None, outputs)
        added = None if bias is None else bias.to(device)
        weight, by_output = q.to(device), scales.to(device)
        device_of.settle(weight)
        for count in (FEW_ROWS, 1):
            some = Int8Rows(rows.values[:count].to(device), rows.scales[:count].to(device), dtype)
            found = int8_linear(some, weight, by_output, added).cpu()
            if not torch.equal(found, wanted[:count]):
                return "the int8 kernel's self-test here found other sums"
    return None
