"""The product of a decode step's few rows with a packed weight, in CUDA C++.

Triton takes the weight through shared memory, where half the bandwidth is lost; here a lane loads
its operand as it lies. NVRTC compiles the kernel for what a layer needs when one first asks for it.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qllm.ops import phase
from qllm.ops.gpu import cuda, driver, layout, nvrtc
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.graph import Graph
from qllm.ops.gpu.layout import BLOCK, PANEL, Shape
from qllm.ops.gpu.rows import aligned
from qllm.ops.gpu.self_test import packed_product
from qllm.quant.packing import PackedWeight
from qllm.quant.packing import pack as pack_rows

MAX_DEPTH_OF_OFFSETS = 2  # as of each group a lane holds two numbers more for each row


class Variant(NamedTuple):
    """The constants of the kernel; see decode.cu."""

    bits: int
    float16: bool
    zeros: bool
    offsets: bool
    wide: bool
    group: int
    warps: int
    depth: int
    tiles: int
    panels: int
    whole: bool
    parts: int = 1
    x_ahead: bool = False
    resident: int = 0


class Arguments(ctypes.Structure):
    """The kernel's, as in decode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "q", "scales", "zeros", "bias", "y")),
        ("x_stride", ctypes.c_int64),
        *(
            (name, ctypes.c_int)
            for name in ("rows", "inputs", "outputs", "panels", "blocks", "groups")
        ),
        ("groups_of_a_block", ctypes.c_uint32),
        ("prefetched", ctypes.c_uint32),
    )


@device_of.once
def unsupported_reason(device: torch.device, *, offsets: bool = False) -> str | None:
    """Why it cannot run on a device, with a weight of scheme "offset" or of another; None: it can.

    Where a GPU cannot, a note says so once: Triton's product then runs in its place.
    """
    if device.type != "cuda":
        return "it is for CUDA devices"
    instead = "decode steps take Triton's product, a slower one"
    name = "decode, offsets" if offsets else "decode"
    test = partial(_self_test, device, offsets)
    return device_of.failure(name, device, test, instead, nvrtc.version)


@device_of.once
def late_reason(device: torch.device) -> str | None:
    """Why kernels do not begin before the one in front has ended; None where they do.

    In a graph the driver makes an edge of it. A note says so once where it fails.
    """
    if reason := cuda.late_reason(device):
        return reason
    instead = "kernels of a step begin when the one in front has ended"
    test = partial(_test_of_order, device)
    return device_of.failure("order", device, test, instead, nvrtc.version)


def about(device: torch.device) -> str:
    """What multiplies in a decode step, for `--explain`."""
    if reason := unsupported_reason(device):
        return f"decode steps too, not in CUDA C++: {reason}"
    return f"decode steps: CUDA C++ by NVRTC {'.'.join(map(str, nvrtc.version()))}{order(device)}"


def order(device: torch.device) -> str:
    """When kernels of a step begin, for `--explain`."""
    if reason := late_reason(device):
        return f", one after the other: {reason}"
    return ", begun before the one in front ends"


def begins_early(device: torch.device) -> bool:
    """Whether a kernel that reads weights may do so before the one in front has ended.

    It may in a step, which begins with an embedding: whatever wrote weights has ended before that.
    Behind anything else a kernel could read what is still being written.
    """
    return phase.decoding() and late_reason(device) is None


def launch_options(device: torch.device) -> dict[str, bool]:
    """What a kernel of Triton's with a constant LATE is launched with, so that it begins early."""
    early = device.type == "cuda" and begins_early(device)
    return {"LATE": early, "launch_pdl": True} if early else {"LATE": False}


def weight_only_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    *,
    early: bool | None = None,
) -> Tensor:
    """`reference.weight_only_linear` for x of one of DTYPES, on tensors of `layout.pack`.

    Args:
        early: it may begin before the kernel in front has ended; None: as `begins_early` says.
    """
    shape = Shape.of(x.shape[1], out_features, group_size)
    x = aligned(shape.pad_groups(x) if shape.pads_groups else x)
    rows, y = len(x), x.new_empty(len(x), out_features)
    if rows == 0:
        return y
    offsets = qzeros.is_floating_point()
    assert not offsets or qzeros.dtype == scales.dtype
    architecture, num_sms = device_of.architecture(x.device)
    cut = cuda.cut(f"decode-{bits}", architecture, rows, shape.panels, shape.blocks, num_sms)
    if offsets:
        depth = min(cut.depth, MAX_DEPTH_OF_OFFSETS)
        cut = cuda.Cut(cut.warps, depth, cut.tiles, panels=1, prefetched=cut.prefetched)
    variant = Variant(
        bits,
        float16=x.dtype == torch.float16,
        zeros=qzeros.numel() > 0 and not offsets,
        offsets=offsets,
        wide=scales.dtype == torch.float32,
        group=shape.span,
        warps=cut.warps,
        depth=cut.depth,
        tiles=cut.tiles,
        panels=cut.panels,
        whole=x.shape[1] == shape.blocks * BLOCK,
        parts=cut.parts,
        x_ahead=cut.x_ahead,
        resident=cut.resident,
    )
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    early = begins_early(x.device) if early is None else early
    arguments = Arguments(
        x.data_ptr(),
        qweight.data_ptr(),
        scales.data_ptr(),
        qzeros.data_ptr() if qzeros.numel() else None,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        rows,
        x.shape[1],
        out_features,
        shape.panels,
        shape.blocks,
        shape.groups,
        _reciprocal(-(-shape.padded_size // BLOCK)),
        cut.prefetched << 10 if early else 0,
    )
    grid = (-(-rows // (8 * cut.tiles)) * cut.parts, -(-shape.panels // cut.panels))
    with device_of.current(x):
        function = cuda.kernel("decode", variant, x.device)
        driver.launch(
            function, grid, cut.threads, arguments, x.device,
            early=early, cluster=cut.parts, shared_bytes=cut.shared_bytes,
        )  # fmt: skip
    return y


def _reciprocal(count: int) -> int:
    """2^32 over a count, rounded up; 0 for one."""
    return -(-(1 << 32) // count) % (1 << 32)


def _self_test(device: torch.device, offsets: bool = False) -> str | None:
    """Products whose sums are exact in any order, so that there is but one result.

    There are so many inputs that of several rows a cluster takes them, where there are clusters.
    """
    tested = packed_product(device, (PANEL + 5, 64 * BLOCK + 72), 11, offsets=offsets)
    for rows in (11, 1):
        x = tested.exact[:rows].to(device)
        found = weight_only_linear(x, *tested.weight, early=False)
        if not torch.equal(found.cpu(), tested.wanted[:rows]):
            return "the decode kernel's self-test here found other sums"
    return None


def _test_of_order(device: torch.device, size: int = 1024, launches: int = 16) -> str | None:
    """Products with a weight that moves x on by one place, each with what the last one found.

    One that read before the other had written would find something else. On a GPU they are made as
    they are, then in a graph, as steps are.
    """
    values = torch.zeros(size, size, dtype=torch.uint8)
    values[torch.arange(size), torch.arange(size).roll(1)] = 1
    zeros = torch.zeros(size, 1, dtype=torch.uint8)
    bits = 4  # of which a cluster takes several rows
    stored = PackedWeight(pack_rows(values, bits), torch.ones(size, 1).half(), zeros)
    there = PackedWeight(*(tensor.to(device) for tensor in stored[:3]))
    packed = layout.pack(there, bits, -1, size)[:3]
    x = torch.arange(11 * size).view(11, size).remainder(251).bfloat16().to(device)
    found = torch.empty_like(x)

    def run() -> None:
        moved = x
        for _ in range(launches):
            moved = weight_only_linear(moved, *packed, None, size, bits, -1, early=True)
        found.copy_(moved)

    runs = [run]
    if device.type == "cuda":
        graph = Graph(run, device)
        runs += [graph.replay] * 2
    for number, again in enumerate(runs):
        found.zero_()
        again()
        if not torch.equal(found, x.roll(launches, 1)):
            where = "in a graph" if number else "launched by themselves"
            return f"kernels that begin early, {where}, did not wait for the one in front"
    return graph.graph_break if device.type == "cuda" else None
