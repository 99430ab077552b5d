"""Kernels in CUDA C++: how one is compiled for what a layer needs, cut, and when it may begin."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from qllm.ops.gpu import device as device_of
from qllm.ops.gpu import driver, nvrtc, tiles

SOURCE = Path(__file__).parent / "src"
DTYPES = (torch.bfloat16, torch.float16)
EARLY = (9, 0)  # the first compute capability whose kernels can begin before the last has ended
WARPS = (4, 8, 16)
TILES = (1, 2, 4)  # eights of rows that a block of threads takes at once
MANY = 8  # panels of a multiprocessor beyond which not all have room at once
SIZE_CLASSES = len(WARPS) + 1  # of weights: by the warps that share a panel, and of many panels
SUMS = 96  # panels times tiles times warps whose sums fit into a block's 48 KiB of shared memory


def source(name: str, *headers: str) -> str:
    """A kernel, as the compiler takes it, behind the headers that it needs besides device.h."""
    parts = ("device.h", *headers, f"{name}.cu")
    return "".join((SOURCE / part).read_text("utf-8") for part in parts)


def options(constants: NamedTuple) -> list[str]:
    """The compiler's, which define a kernel's constants."""
    return [f"-D{name.upper()}={int(value)}" for name, value in constants._asdict().items()]


@cache
def kernel(name: str, constants: NamedTuple, device: torch.device) -> ctypes.c_void_p:
    """A kernel, compiled for a device."""
    architecture, _ = device_of.architecture(device)
    target = f"--gpu-architecture=sm_{architecture.replace('.', '')}"
    binary = nvrtc.compile_cached(source(name), ["--std=c++17", target, *options(constants)])
    return driver.load(binary, device, name)


class Cut(NamedTuple):
    """How a product of few rows is cut: what a block of threads takes, and how.

    Attributes:
        warps: of a block of threads, which share its inputs.
        depth: blocks of inputs that a warp asks for in advance.
        tiles: eights of rows.
        panels: of outputs, which share the rows that they read.
    """

    warps: int
    depth: int
    tiles: int
    panels: int


def cut(kind: str, architecture: str, rows: int, panels: int, blocks: int, num_sms: int) -> Cut:
    """How to cut a product of so many rows with a weight of so many panels and blocks.

    The number of warps, which decides on the order of sums, does not depend on the rows.
    """
    row = tiles.entry(architecture, kind)
    sharing = warps(row["warps_per_sm"], panels, blocks, num_sms)
    tall = next((count for count in TILES if rows <= 8 * count), TILES[-1])
    wide, depth = row["cuts"][str(8 * tall)][size_class(sharing, panels, num_sms)]
    return Cut(sharing, depth, tall, 1 if sharing * tall * wide > SUMS else wide)


def size_class(warps: int, panels: int, num_sms: int) -> int:
    """Which of "cuts" of the table is for so many warps and panels: one of SIZE_CLASSES."""
    return len(WARPS) if panels > MANY * num_sms else WARPS.index(warps)


def warps(wanted: int, panels: int, blocks: int, num_sms: int) -> int:
    """Warps that share a panel, so that few panels keep every multiprocessor busy.

    Args:
        wanted: warps of a multiprocessor.
    """
    max_warps = max(WARPS[0], min(blocks, wanted * num_sms // panels))
    return max(count for count in WARPS if count <= max_warps)


def late_reason(device: torch.device) -> str | None:
    """Why no kernel can begin before the one in front has ended; None where they can."""
    architecture, _ = device_of.architecture(device)
    if tuple(map(int, architecture.split("."))) < EARLY:
        return f"compute capability {architecture} is below {'.'.join(map(str, EARLY))}"
    return "QLLM_PDL=0" if os.environ.get("QLLM_PDL") == "0" else None
