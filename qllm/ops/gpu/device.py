"""Whether the GPU kernels can run, and what they need of a device."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Generic, ParamSpec

import torch
from torch import Tensor

from qllm.errors import first_line
from qllm.ops.gpu import disk_cache

P = ParamSpec("P")
SLOWLY = "running plain torch ops, which are slow"
OLDEST = (8, 0)  # Ampere: the first compute capability that multiplies bfloat16
INTERPRETED_SMS = 4  # so that the interpreter gets to split a product
MAX_TILES = 1 << 16
COMPILED_AT_ONCE = 4  # kernels


class once(Generic[P]):  # noqa: N801 - a decorator
    """What a function returns for some arguments, found once: by one thread, for which others wait.

    Kernels are tested, and compiled, by the thread that runs a model and by one that runs layers
    while others are read.
    """

    _lock = threading.RLock()

    def __init__(self, find: Callable[P, str | None]) -> None:
        self._found = cache(find)
        self.cache_clear = self._found.cache_clear

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> str | None:
        with self._lock:
            return self._found(*args, **kwargs)  # type: ignore[arg-type]


def interpreting() -> bool:
    """Whether the kernels are to run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_reason(device: str) -> str | None:
    """Why the kernels cannot run on a device, by its type; None where they can."""
    if device != "cuda" and not (device == "cpu" and interpreting()):
        return "it is for CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None if device == "cpu" else _unfit()


@once
def _unfit() -> str | None:
    """Why no GPU here can run them; of one that cannot, a note says so at the first call."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if reason := _too_old():
        _say(reason, SLOWLY)
        return reason
    return failure("Triton", torch.device("cuda", 0), _self_test, SLOWLY)


def _too_old() -> str | None:
    name = torch.cuda.get_device_name()
    if torch.version.hip:
        return f"the GPU kernels are for NVIDIA's GPUs, not for {name}"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"{name} is of compute capability {'.'.join(map(str, capability))}, below {oldest}"
    return None


@cache
def say_that_it_compiles() -> None:
    """Tell the user, once, what takes so long."""
    print("note: compiling GPU kernels, which are kept for the next time ...", file=sys.stderr)


@cache
def watch_triton() -> None:
    """Tell the user where Triton compiles, when it has compiled the first kernel."""
    import triton

    def compiled(*, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            say_that_it_compiles()

    triton.knobs.compilation.listener = compiled


def _self_test() -> str | None:
    """What keeps Triton from running a small kernel: it wants a C compiler and Python's headers."""
    from qllm.ops.gpu.rows import quantize

    try:
        found = quantize(torch.tensor([[-3.0, 0.0, 3.0]], device="cuda"), None).values.tolist()
    except Exception as error:  # whatever a compiler or a driver may raise
        return f"Triton cannot run here: {first_line(error)}"
    return None if found == [[-128, 0, 127]] else f"Triton's self-test here found {found}"


def failure(
    name: str,
    device: torch.device,
    test: Callable[[], str | None],
    instead: str,
    depends: Callable[[], object] = str,
) -> str | None:
    """What a self-test finds wrong on a GPU; a note then says what runs instead.

    That it found nothing is kept: it is not made again while nothing changes that it depends on.

    Args:
        depends: what else than `disk_cache.test_name` knows of; where it raises, nothing can run.
    """
    try:
        passed = disk_cache.test_name(f"{name}, {depends()}", device)
        reason = None if disk_cache.read(passed) else test()
        if reason is None:
            disk_cache.write(passed, name.encode())
    except Exception as error:  # whatever a compiler or a driver may raise
        reason = first_line(error)
    if reason:
        _say(reason, instead)
    return reason


def together(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What calls return that compile a kernel each: several at once, but in the interpreter."""
    if interpreting():
        return [call() for call in calls]
    with ThreadPoolExecutor(COMPILED_AT_ONCE, "compiling") as pool:
        return [each.result() for each in [pool.submit(call) for call in calls]]


def _say(reason: str, instead: str) -> None:
    print(f"note: {reason}; {instead}", file=sys.stderr)


def about() -> str:
    """Where the kernels run, for `--explain`."""
    if interpreting():
        return "Triton, in its interpreter"
    return f"Triton, on compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}"


@cache
def architecture(device: torch.device) -> tuple[str, int]:
    """A device's compute capability, such as "9.0", and how many multiprocessors (SMs) it has."""
    if device.type != "cuda":
        return "interpreter", INTERPRETED_SMS
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.major}.{properties.minor}", properties.multi_processor_count


def current(tensor: Tensor) -> AbstractContextManager:
    """Makes a tensor's device the one that kernels are launched on."""
    if not tensor.is_cuda:
        return nullcontext()
    watch_triton()
    return torch.cuda.device(tensor.device)


def settle(tensor: Tensor) -> None:
    """Wait until a weight is written, which kernels that begin early read before they wait."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def counters(device: torch.device) -> Tensor:
    """int32 zeros (MAX_TILES,), of the stream in use, which every launch leaves as it finds."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _counters(device, stream)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
