"""Kernels that are no Triton's, loaded and launched by CUDA's driver."""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import torch

from qllm.ops.gpu.nvrtc import Unavailable

PROGRAMMATIC_STREAM_SERIALIZATION = 6


class Attribute(ctypes.Structure):
    """CUlaunchAttribute, its value a number."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class _Thread(threading.local):
    """Whether this thread has a context, which the driver, unlike torch, does not make."""

    ready = False


_thread = _Thread()


@cache
def library() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        Unavailable: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable("there is no driver of CUDA (libcuda.so.1)") from error


def load(binary: bytes, device: torch.device, name: str) -> ctypes.c_void_p:
    """A binary's kernel of a name, for a device.

    Raises:
        RuntimeError: the driver refuses it.
    """
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _take_context(device)
    _call("cuModuleLoadData", ctypes.byref(module), binary)
    _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    return function


def launch(
    function: ctypes.c_void_p, grid: tuple[int, int], threads: int, arguments: ctypes.Structure,
    device: torch.device, *, early: bool,
) -> None:  # fmt: skip
    """Launch a kernel on torch's current stream.

    Args:
        arguments: the one structure that it takes, which is copied.
        early: it may begin before the kernel in front has ended, for which it waits by itself.

    Raises:
        RuntimeError: the driver refuses.
    """
    _take_context(device)
    attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value[0] = 1
    config = Config()
    config.grid[:], config.block[:] = (*grid, 1), (threads, 1, 1)
    if device.type == "cuda":
        config.stream = torch.cuda.current_stream(device).cuda_stream
    config.attributes, config.attribute_count = ctypes.pointer(attribute), int(early)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    _call("cuLaunchKernelEx", ctypes.byref(config), function, parameters, None)


def _take_context(device: torch.device) -> None:
    if _thread.ready:
        return
    context, number = ctypes.c_void_p(), device.index or 0
    _call("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        _call("cuCtxSetCurrent", context)
    _thread.ready = True


def _call(name: str, *arguments: object) -> None:
    if status := getattr(library(), name)(*arguments):
        raise RuntimeError(f"{name} failed: CUDA error {status}")
