"""Tensors at the edge of a fence: a page of memory that may not be touched.

Who touches it dies, hence a process of its own.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
from pathlib import Path

import processes
import torch
from conftest import ROOT
from torch import Tensor

NO_ACCESS = 0
TESTS = Path(__file__).parent
mappings: list[mmap.mmap] = []


@functools.cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def fenced(tensor: Tensor, *, at_end: bool) -> Tensor:
    """A copy between two fences, which begins or ends with one."""
    if not tensor.numel():
        return tensor
    pages = -(-tensor.nbytes // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    mappings.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (0, pages + 1):
        at = ctypes.c_void_p(start + page * mmap.PAGESIZE)
        assert not libc().mprotect(at, mmap.PAGESIZE, NO_ACCESS)
    offset = mmap.PAGESIZE + (pages * mmap.PAGESIZE - tensor.nbytes if at_end else 0)
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)


def run_in(module: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command in a test module, in a process of its own."""
    folders = [str(ROOT), str(TESTS), str(module.parent)]
    program = f"import sys; sys.path[:0] = {folders}; from {module.stem} import *; {command}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return processes.run(["-c", program], env=environment)
