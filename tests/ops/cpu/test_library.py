"""What the library does to the process that has it."""

from __future__ import annotations

import ctypes
import os
import resource

import pytest
import torch

from qllm.ops.cpu.library import ALLOCATION, library


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="it is glibc's")
@pytest.mark.skipif(
    bool(set(ALLOCATION) & set(os.environ)), reason="the environment says what to do"
)
def test_memory_that_is_freed_is_not_cleared_anew():
    library()
    faults = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(5)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    pages = 5 * (16 << 20) // resource.getpagesize()
    assert min(faults[1:]) < pages / 10
