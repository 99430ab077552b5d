"""The compiled kernels, the path they run on, and how Python calls them."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from functools import cache
from typing import cast

import torch
from torch import Tensor

from qllm.ops.cpu import build, interface, paths
from qllm.ops.cpu.capture import call
from qllm.ops.cpu.paths import PATHS

HUGE_PAGE = 1 << 21
ARENA_BYTES = 32 << 20
AHEAD_BYTES = 4 * HUGE_PAGE
# Of Linux's madvise, the second from 5.14 on; before, it refuses, and nothing is lost.
DONTNEED, POPULATE_WRITE = 4, 23
CACHE_LINE = 64
# Of glibc's mallopt, and its names in the environment.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
ALLOCATION = {
    "MALLOC_TRIM_THRESHOLD_": (TRIM_THRESHOLD, 128 << 20),
    "MALLOC_MMAP_THRESHOLD_": (MMAP_THRESHOLD, 32 << 20),
}
# Where several threads have activations of their own. A thread's arena consists of heaps of 64 MB;
# one that is free as a whole goes back, whatever the threshold, but for what the pad is to leave.
OF_WORKERS = ALLOCATION | {
    "MALLOC_TRIM_THRESHOLD_": (TRIM_THRESHOLD, 1 << 30),
    "MALLOC_TOP_PAD_": (TOP_PAD, 256 << 20),
}
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Library(ctypes.CDLL):
    """The compiled kernels, with the name of the path that is in use."""

    path: str


@cache
def library() -> Library:
    """The compiled kernels, on a path that `QLLM_CPU_PATH` names or the best there is.

    Raises:
        build.Unavailable: they cannot be had here.
        UserError: for a path that is unknown, or that this machine lacks.
    """
    names = paths.wanted()
    loaded = cast("Library", build.load(omitted=paths.omitted(names)))
    interface.declare(loaded)
    if op := interface.mismatch(loaded):
        reason = f"the CPU kernels and QLLM's Python differ on the arguments of {op}"
        raise build.Unavailable(f"{reason}; reinstall QLLM")
    features = ctypes.c_int64(loaded.qllm_features())
    for name in names:
        if loaded.qllm_use(name.encode(), features):
            loaded.path = name
            return loaded
    if os.environ.get(paths.VARIABLE):
        raise paths.refusal(tuple(name for name in paths.available() if name not in names))
    reason = f"this processor has no {PATHS[names[-1]].about}, though {paths.CPUINFO} says so"
    raise build.Unavailable(f"{reason}; set {paths.VARIABLE}=scalar")


def keep_freed_memory(*, workers: bool = False) -> None:
    """Let the allocator give back what is free, and keep what is freed from now on.

    A prompt's activations are some megabytes, freed and allocated anew in every layer. What the
    allocator gives back to the system comes again as pages that are cleared, one by one: of four
    prompts of 128 tokens and OPT-125m's sizes, a fifth of the time of two threads. In front of
    loading it would keep what that needs besides. Where the environment says what the allocator
    is to do, nothing is done.

    Args:
        workers: threads with parts of the work to themselves are to come.
    """
    asked = OF_WORKERS if workers else ALLOCATION
    system = ctypes.CDLL(None)
    if not hasattr(system, "mallopt") or set(OF_WORKERS) & set(os.environ):  # glibc's alone
        return
    system.malloc_trim(ctypes.c_size_t(0))
    for parameter, nbytes in asked.values():
        system.mallopt(ctypes.c_int(parameter), ctypes.c_int(nbytes))


@cache
def unavailable() -> str | None:
    """Why there are no kernels, None where there are; the first call says it on standard error."""
    try:
        library()
    except build.Unavailable as error:
        print(f"note: {error}; running plain torch ops, which are slow", file=sys.stderr)
        return str(error)
    return None


def idle(*, exclusive: bool = False) -> None:
    """Let the threads of the kernels sleep at once, if there are any: no work will come soon.

    Args:
        exclusive: others of this machine work meanwhile, that take turns with this process: behind
            theirs, its threads have the machine to themselves, and spread over it.
    """
    if library.cache_info().currsize:
        library().qllm_idle(ctypes.c_int64(exclusive))


def about() -> str:
    """The path in use, in words; and why AMX is not, where this machine has it."""
    state = library().qllm_amx_state().decode()
    failed = "" if state in ("used", "absent") else f" (AMX: {state})"
    return PATHS[library().path].about + failed


def unsupported_reason(device: str) -> str | None:
    """Why kernels cannot run on a device, None where they can."""
    if device != "cpu":
        return "it is for CPUs"
    reason = unavailable()
    return None if reason is None else f"not on this machine: {reason}"


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements are; None, C's null, for none."""
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def like(x: Tensor, other: Tensor | None) -> Tensor | None:
    """`other` in the type of x, which all tensors of a call have, and without gaps."""
    return None if other is None else other.to(x.dtype).contiguous()


def run(name: str, arguments: ctypes.Structure, *tensors: Tensor | None) -> None:
    """Call an op by name; `tensors` are those that the arguments point to."""
    call(library(), name, arguments, *tensors)


def huge_pages(nbytes: int) -> Tensor:
    """Memory on huge pages, where the system grants them: uint8 (nbytes,), not written to yet.

    A stream over pages of 4 KiB is slower by up to a third: each page is looked up, and prefetching
    ends with it.
    """
    memory = torch.empty(nbytes + HUGE_PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    memory = memory[start : start + nbytes]
    library().qllm_huge_pages(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(nbytes))
    return memory


def release(memory: Tensor) -> None:
    """Give the system back the huge pages that are whole in some memory: zeros stand there then."""
    first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    first, end = -(-first // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    if sys.platform == "linux" and first < end:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), DONTNEED)


def _populate(memory: Tensor) -> None:
    """Have the system clear the pages of some memory now."""
    size = ctypes.c_size_t(len(memory))
    ctypes.CDLL(None).madvise(ctypes.c_void_p(memory.data_ptr()), size, POPULATE_WRITE)


class Arena:
    """Tensors side by side on huge pages, which are larger than many a layer.

    Pages are cleared by another thread, some way ahead of what is used: it takes the system a third
    of the time in which a small model is loaded.

    Attributes:
        used: bytes of the memory that tensors have.
        ready: bytes that are cleared, or soon will be.
    """

    def __init__(self) -> None:
        self.memory, self.used, self.ready = torch.empty(0, dtype=torch.uint8), 0, 0
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor like `torch.empty`'s; its memory is freed with the last of its neighbours."""
        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            if self.used + nbytes > len(self.memory):
                self.memory, self.used, self.ready = huge_pages(max(ARENA_BYTES, nbytes)), 0, 0
            part = self.memory[self.used : self.used + nbytes]
            self.used += -(-nbytes // CACHE_LINE) * CACHE_LINE
            if self.used + AHEAD_BYTES // 2 > self.ready and nbytes < ARENA_BYTES:
                start = self.ready
                self.ready = (self.used + AHEAD_BYTES) // HUGE_PAGE * HUGE_PAGE
                ahead = self.memory[start : self.ready]
                if ahead.numel():
                    threading.Thread(target=_populate, args=(ahead,)).start()
        return part.view(dtype).view(shape)
