"""What a GPU allows, measured by torch's own copies and products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from qllm.ops.cpu.limits import median_seconds
from qllm.ops.gpu.graph import Graph

COPY_BYTES = 1 << 30
PRODUCT = 8192  # rows and columns


def copy_bandwidth(device: torch.device | str, size: int = COPY_BYTES) -> float:
    """Bytes per second of a copy within the device's memory, read and written: a median.

    A kernel copies: the memory copies of a captured graph may take half as long again as the same
    ones outside of it (1 GiB on an H200: 2.75 TB/s in place of 4.26).
    """
    source = torch.zeros(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    copy = partial(torch.bitwise_not, source, out=target)
    return 2 * source.nbytes / seconds([copy] * 3, source.device)


def product_rate(device: torch.device | str, size: int = PRODUCT) -> float:
    """Operations per second of a product in bfloat16, two for each term: a median."""
    a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16)
    return 2 * size**3 / seconds([lambda: a @ b] * 3, a.device)


def int8_rate(device: torch.device | str, size: int = PRODUCT) -> float:
    """Operations per second of a product of int8, two for each term: a median."""
    a, b = torch.randint(-128, 128, (2, size, size), device=device).to(torch.int8)
    return 2 * size**3 / seconds([lambda: torch._int_mm(a, b.t())] * 3, a.device)


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int = 5) -> float:
    """Median time of one of some calls, which are made in turn.

    On a GPU they are captured as a graph and replayed, so that what launches them does not count.
    """

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return median_seconds(run, repeats) / len(calls)
    graph = Graph(run, device)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize(device)

    return median_seconds(replay, repeats) / len(calls)
