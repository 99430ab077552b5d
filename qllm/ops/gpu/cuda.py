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
# Panels of a multiprocessor: beyond the first number not all have room at once, beyond the second
# they have if warps hold little in advance; up to the third, some have half as many more as others.
MANY, SOME, UNEVEN = 8, 6, 2.5
DEEP = 4  # blocks of a warp from which on what a block of threads begins and ends with counts less
# Of weights: by the warps that share a panel; of MANY, SOME and UNEVEN panels; and DEEP ones. Where
# a table has no cut for one of the last three, it takes that of the warps.
SIZE_CLASSES = len(WARPS) + 4
SUMS_BYTES = 512  # of a warp, for a panel and a tile
MAX_SHARED_BYTES = 48 << 10  # of a block of threads
REGISTERS, MIN_REGISTERS = 1 << 16, 96  # of a multiprocessor; of a thread that takes many rows


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
    words = ["--std=c++17", target, *options(constants)]
    binary = nvrtc.compile_cached(source(name), words, name)
    return driver.load(binary, device, name)


class Cut(NamedTuple):
    """How a product of few rows is cut: what a block of threads or a cluster takes, and how.

    Attributes:
        warps: which share the inputs.
        depth: blocks of inputs that a warp asks for in advance.
        tiles: eights of rows.
        panels: of outputs, which share the rows that they read.
        parts: blocks of threads of a cluster, which have a part of the warps each.
        x_ahead: whether rows are asked for as far in advance as blocks of inputs are.
        resident: blocks of threads for which a multiprocessor is to have registers; 0: any number.
        prefetched: KB of a panel up to which it is asked for into the L2 before the kernel in
            front has ended.
    """

    warps: int
    depth: int
    tiles: int
    panels: int
    parts: int = 1
    x_ahead: bool = False
    resident: int = 0
    prefetched: int = 0

    @property
    def threads(self) -> int:
        """Of a block of threads."""
        return 32 * self.warps // self.parts

    @property
    def shared_bytes(self) -> int:
        """Of a block of threads, for the sums that it adds up."""
        return SUMS_BYTES * self.warps * self.tiles * self.panels // self.parts


def cut(kind: str, architecture: str, rows: int, panels: int, blocks: int, num_sms: int) -> Cut:
    """How to cut a product of so many rows with a weight of so many panels and blocks.

    The number of warps, which decides on the order of sums, does not depend on the rows.
    """
    row = tiles.entry(architecture, kind)
    sharing = warps(row["warps_per_sm"], panels, blocks, num_sms)
    tall = next((count for count in TILES if rows <= 8 * count), TILES[-1])
    cuts = row["cuts"][str(8 * tall)]
    own = size_class(sharing, panels, blocks, num_sms)
    wide, depth, *others = cuts[own if own < len(cuts) else WARPS.index(sharing)]
    parts, x_ahead, at_once = others or (1, False, False)
    prefetched = row.get("prefetched", 0)
    found = Cut(sharing, depth, tall, wide, parts, x_ahead, prefetched=prefetched)
    if found.shared_bytes > MAX_SHARED_BYTES:
        return Cut(sharing, depth, tall, 1, prefetched=prefetched)
    if not at_once:
        return found
    resident = -(-(-(-panels // wide) * parts) // num_sms)
    return found._replace(resident=min(resident, REGISTERS // (MIN_REGISTERS * found.threads)))


def size_class(warps: int, panels: int, blocks: int, num_sms: int) -> int:
    """Which of "cuts" of the table is for a weight that so many warps share."""
    own, of_warps = WARPS.index(warps), len(WARPS)
    if panels > MANY * num_sms:
        return of_warps
    if own == 0 and panels > SOME * num_sms:
        return of_warps + 1
    if own == 1 and panels <= UNEVEN * num_sms:
        return of_warps + 2
    return of_warps + 3 if own == 2 and blocks >= DEEP * warps else own


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
