"""What the library does to the process that has it."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import pytest
import torch
from fences import run_in

from qllm.ops.cpu.library import OF_WORKERS, keep_freed_memory


def print_faults(workers: bool) -> None:
    """The pages that the system clears when blocks come a second and third time; of all of them."""
    keep_freed_memory(workers=workers)
    faults, count = [], 15 if workers else 5
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(count)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(min(faults[1:]), count * (16 << 20) // resource.getpagesize())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="it is glibc's")
@pytest.mark.skipif(
    bool(set(OF_WORKERS) & set(os.environ)), reason="the environment says what to do"
)
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="it allocates itself")
@pytest.mark.parametrize("workers", [False, True])
def test_memory_that_is_freed_is_not_cleared_anew(workers):
    """In a process of its own: what else is free at the heap's end counts towards the threshold."""
    done = run_in(Path(__file__), f"print_faults({workers})")
    assert done.returncode == 0, done.stderr
    faults, pages = map(int, done.stdout.split())
    assert faults < pages / 10
