"""What the library does to the process that has it."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import pytest
import torch
from fences import run_in

from qllm.ops.cpu.library import ALLOCATION, keep_freed_memory


def print_faults() -> None:
    """The pages that the system clears when blocks come a second and third time; of all of them."""
    keep_freed_memory()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(5)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(min(faults[1:]), 5 * (8 << 20) // resource.getpagesize())


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="it is glibc's")
@pytest.mark.skipif(
    bool(set(ALLOCATION) & set(os.environ)), reason="the environment says what to do"
)
def test_memory_that_is_freed_is_not_cleared_anew():
    """In a process of its own: what else is free at the heap's end counts towards the threshold."""
    done = run_in(Path(__file__), "print_faults()")
    assert done.returncode == 0, done.stderr
    faults, pages = map(int, done.stdout.split())
    assert faults < pages / 10
