"""The product of a decode step's few rows with a packed weight, in CUDA C++.

Triton takes the weight through shared memory, where half the bandwidth is lost; here a lane loads
its operand as it lies. NVRTC compiles the kernel for what a layer needs when one first asks for it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.errors import first_line
from qllm.ops import reference
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu import driver, layout, nvrtc, tiles
from qllm.ops.gpu.layout import BLOCK, PANEL, Shape
from qllm.quant.packing import PackedWeight
from qllm.quant.packing import pack as pack_rows

SOURCE = Path(__file__).parent / "src"
DTYPES = (torch.bfloat16, torch.float16)
ALIGNED = 8  # numbers of x that are loaded at once
EARLY = (9, 0)  # the first compute capability whose kernels can begin before the last has ended
WARPS = (4, 8, 16)
TILES = (1, 2, 4)  # eights of rows that a block of threads takes at once


class Variant(NamedTuple):
    """The constants of the kernel; see decode.cu."""

    bits: int
    float16: bool
    zeros: bool
    wide: bool
    group: int
    warps: int
    depth: int
    tiles: int

    @property
    def options(self) -> list[str]:
        """Those that define the constants."""
        return [f"-D{name.upper()}={int(value)}" for name, value in self._asdict().items()]


class Arguments(ctypes.Structure):
    """The kernel's, as in decode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "q", "scales", "zeros", "bias", "y")),
        ("x_stride", ctypes.c_int64),
        *(
            (name, ctypes.c_int)
            for name in ("rows", "inputs", "outputs", "panels", "blocks", "groups")
        ),
        ("groups_of_a_block", ctypes.c_int64),
    )


def source() -> str:
    """The kernel, as the compiler takes it."""
    return "".join((SOURCE / name).read_text("utf-8") for name in ("device.h", "decode.cu"))


def warps(wanted: int, panels: int, blocks: int, num_sms: int) -> int:
    """Warps that share a panel, so that few panels keep every multiprocessor busy.

    Args:
        wanted: warps of a multiprocessor.
    """
    max_warps = max(WARPS[0], min(blocks, wanted * num_sms // panels))
    return max(count for count in WARPS if count <= max_warps)


@cache
def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot run on a device; None where it can.

    Where a GPU cannot, a note says so once: Triton's product then runs in its place.
    """
    if device.type != "cuda":
        return "it is for CUDA devices"
    try:
        reason = _self_test(device)
    except Exception as error:  # whatever a compiler or a driver may raise
        reason = first_line(error)
    if reason:
        print(f"note: {reason}; decode steps take Triton's product, a slower one", file=sys.stderr)
    return reason


def about(device: torch.device) -> str:
    """What multiplies in a decode step, for `--explain`."""
    if reason := unsupported_reason(device):
        return f"decode steps too, not in CUDA C++: {reason}"
    return f"decode steps: CUDA C++ by NVRTC {'.'.join(map(str, nvrtc.version()))}"


def weight_only_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`reference.weight_only_linear` for x of one of DTYPES, on tensors of `layout.pack`."""
    shape = Shape.of(x.shape[1], out_features, group_size)
    x = _aligned(shape.pad_groups(x) if shape.pads_groups else x)
    rows, y = len(x), x.new_empty(len(x), out_features)
    if rows == 0:
        return y
    architecture, num_sms = device_of.architecture(x.device)
    row = tiles.entry(architecture, f"decode-{bits}")
    tall = next((count for count in TILES if rows <= 8 * count), TILES[-1])
    variant = Variant(
        bits,
        float16=x.dtype == torch.float16,
        zeros=qzeros.numel() > 0,
        wide=scales.dtype == torch.float32,
        group=shape.span,
        warps=warps(row["warps_per_sm"], shape.panels, shape.blocks, num_sms),
        depth=row["depth"],
        tiles=tall,
    )
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    arguments = Arguments(
        x.data_ptr(),
        qweight.data_ptr(),
        scales.data_ptr(),
        qzeros.data_ptr() if variant.zeros else None,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        rows,
        x.shape[1],
        out_features,
        shape.panels,
        shape.blocks,
        shape.groups,
        -(-(1 << 32) // -(-shape.padded_size // BLOCK)),
    )
    grid = (-(-rows // (8 * tall)), shape.panels)
    with device_of.current(x):
        function, early = _kernel(variant, x.device)
        driver.launch(function, grid, 32 * variant.warps, arguments, x.device, early=early)
    return y


def _aligned(x: Tensor) -> Tensor:
    """x (M, K) with rows that begin where ALIGNED numbers can be loaded, and end with such."""
    x = pad(x, (0, -x.shape[1] % ALIGNED))
    bytes_at_once = ALIGNED * x.element_size()
    if x.stride(1) == 1 and x.stride(0) % ALIGNED == 0 and x.data_ptr() % bytes_at_once == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@cache
def _kernel(variant: Variant, device: torch.device) -> tuple[ctypes.c_void_p, bool]:
    """A kernel, and whether it can begin early."""
    architecture, _ = device_of.architecture(device)
    options = [f"--gpu-architecture=sm_{architecture.replace('.', '')}", *variant.options]
    binary = nvrtc.compile_cached(source(), ["--std=c++17", *options])
    return driver.load(binary, device), tuple(map(int, architecture.split("."))) >= EARLY


def _self_test(device: torch.device) -> str | None:
    """Products whose sums are exact in any order, so that there is but one result."""
    outputs, inputs, bits, group = PANEL + 5, 3 * BLOCK + 72, 4, 64
    count = -(-inputs // group)
    values = torch.arange(outputs * inputs).view(outputs, inputs).mul(7).remainder(16)
    zeros = torch.arange(outputs * count).view(outputs, count).remainder(16)
    scales = torch.tensor([0.25, 0.5, 1.0])[torch.arange(outputs * count) % 3].view(outputs, count)
    stored = PackedWeight(
        pack_rows(values.to(torch.uint8), bits), scales.half(), zeros.to(torch.uint8)
    )
    options = (outputs, bits, group)
    x = torch.arange(11 * inputs).view(11, inputs).remainder(5).sub(2).to(torch.bfloat16)
    wanted = reference.weight_only_linear(x.float(), *stored[:3], None, *options).bfloat16()
    there = PackedWeight(*(tensor.to(device) for tensor in stored[:3]))
    packed = layout.pack(there, bits, group, inputs)[:3]
    for rows in (11, 1):
        found = weight_only_linear(x[:rows].to(device), *packed, None, *options)
        if not torch.equal(found.cpu(), wanted[:rows]):
            return "the decode kernel's self-test here found other sums"
    return None
