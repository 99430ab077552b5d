"""Kernels that are no Triton's, loaded and launched by CUDA's driver."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from qllm.ops.gpu.nvrtc import Unavailable

CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # attributes of a launch
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # attribute of a function
UINT_OF_BYTES = {1: 0, 2: 1, 4: 2, 8: 4}  # types of tensor maps
SWIZZLE_128B, L2_PROMOTION_256B = 3, 3  # of tensor maps
TENSOR_MAP_ALIGNMENT = 64


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


class TensorMap(ctypes.Structure):
    """CUtensorMap."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


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
    with _context_of(device):
        _call("cuModuleLoadData", ctypes.byref(module), binary)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    return function


def launch(
    function: ctypes.c_void_p, grid: tuple[int, int], threads: int, arguments: ctypes.Structure,
    device: torch.device, *, early: bool, cluster: int = 1, shared_bytes: int = 0,
) -> None:  # fmt: skip
    """Launch a kernel on torch's current stream.

    Args:
        arguments: the one structure that it takes, which is copied.
        early: it may begin before the kernel in front has ended, for which it waits by itself.
        cluster: blocks of threads side by side that run together.
        shared_bytes: dynamic shared memory of a block, no more than `allow_shared` was told.

    Raises:
        RuntimeError: the driver refuses.
    """
    attributes = (Attribute * 2)()
    count = 0
    if early:
        attributes[count].id, attributes[count].value[0] = PROGRAMMATIC_STREAM_SERIALIZATION, 1
        count += 1
    if cluster > 1:
        attributes[count].id, attributes[count].value[:3] = CLUSTER_DIMENSION, (cluster, 1, 1)
        count += 1
    config = Config()
    config.grid[:], config.block[:] = (*grid, 1), (threads, 1, 1)
    config.shared_bytes = shared_bytes
    if device.type == "cuda":
        config.stream = torch.cuda.current_stream(device).cuda_stream
    config.attributes, config.attribute_count = attributes, count
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    with _context_of(device):
        _call("cuLaunchKernelEx", ctypes.byref(config), function, parameters, None)


def allow_shared(function: ctypes.c_void_p, size: int) -> None:
    """Allow a kernel so many bytes of dynamic shared memory; by itself it has 48 KiB.

    Raises:
        RuntimeError: the driver refuses.
    """
    _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, size)


def tensor_map(
    pointer: int, size: int, shape: tuple[int, int], stride: int, tile: tuple[int, int],
    device: torch.device, *, swizzle: bool = False,
) -> TensorMap:  # fmt: skip
    """Of a matrix, what copies of its tiles to shared memory want; zeros where the matrix ends.

    Args:
        pointer: where it begins, a multiple of 16 bytes.
        size: bytes of a number: 1, 2, 4 or 8.
        shape: rows and columns.
        stride: bytes from a row to the next one, a multiple of 16.
        tile: rows and columns of one, up to 256.
        swizzle: a tile's rows, of 128 bytes, lie in pieces of 16 whose number is XORed with the
            row's last three bits.

    Raises:
        RuntimeError: the driver refuses.
    """
    space = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + TENSOR_MAP_ALIGNMENT)
    made = TensorMap.from_buffer(space, -ctypes.addressof(space) % TENSOR_MAP_ALIGNMENT)
    with _context_of(device):
        _call(
            "cuTensorMapEncodeTiled",
            ctypes.byref(made),
            UINT_OF_BYTES[size],
            2,
            ctypes.c_void_p(pointer),
            (ctypes.c_uint64 * 2)(*reversed(shape)),
            (ctypes.c_uint64 * 1)(stride),
            (ctypes.c_uint32 * 2)(*reversed(tile)),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            SWIZZLE_128B if swizzle else 0,
            L2_PROMOTION_256B,
            0,
        )
    return made


@contextmanager
def _context_of(device: torch.device) -> Iterator[None]:
    """Makes a device's context this thread's inside, which the driver, unlike torch, does not do.

    The one before is torch's current device, and is left as it was, but in a thread without one.
    """
    before, own = ctypes.c_void_p(), _primary_context(device.index or 0)
    _call("cuCtxGetCurrent", ctypes.byref(before))
    if before.value == own.value:
        yield
        return
    _call("cuCtxSetCurrent", own)
    try:
        yield
    finally:
        if before:
            _call("cuCtxSetCurrent", before)


@cache
def _primary_context(number: int) -> ctypes.c_void_p:
    """A device's context that torch uses, too."""
    context = ctypes.c_void_p()
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    return context


def _call(name: str, *arguments: object) -> None:
    if status := getattr(library(), name)(*arguments):
        raise RuntimeError(f"{name} failed: CUDA error {status}")
