"""NVIDIA's runtime compiler, which torch's CUDA build brings; `disk_cache` has its results."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from qllm.errors import first_line
from qllm.ops.gpu import disk_cache
from qllm.ops.gpu.device import say_that_it_compiles

VERSIONS = ("13", "12")


class Unavailable(Exception):  # noqa: N818 - it says what is the case, not what went wrong
    """No kernel can be compiled, or none can run; one line says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiler's library.

    Raises:
        Unavailable: there is none.
    """
    for name in _names():
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise Unavailable("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")


def _names() -> Iterator[str]:
    """Where it may be: in the packages that torch's CUDA builds ask for, else where the system is.

    That of torch's own version of CUDA comes first: the driver is known to take what it makes.
    """
    own = (torch.version.cuda or "").partition(".")[0]
    versions = sorted(VERSIONS, key=lambda version: version != own)
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    for version in versions:
        for root in roots:
            yield from map(str, root.glob(f"*/lib/libnvrtc.so.{version}"))
        yield f"libnvrtc.so.{version}"


def compile_cached(source: str, options: Sequence[str], kernel: str) -> bytes:
    """The binary of a source for one compute capability, from the cache where it was made before.

    Args:
        options: of the compiler, such as --gpu-architecture=sm_90.
        kernel: its name, for what the compiler says.

    Raises:
        Unavailable: there is no compiler, or it refuses.
    """
    name = f"gpu-{disk_cache.key_of(source, list(options), version())}.cubin"
    if found := disk_cache.read(name):
        return found
    say_that_it_compiles()
    made = compile(source, options, kernel)
    disk_cache.write(name, made)
    return made


def version() -> tuple[int, int]:
    """The compiler's, such as (13, 0)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile(source: str, options: Sequence[str], kernel: str) -> bytes:
    """`compile_cached`, without the cache."""
    own, program = library(), ctypes.c_void_p()
    words, name = [option.encode() for option in options], f"{kernel}.cu".encode()
    _call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name, 0, None, None)
    try:
        if own.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words)):
            said = _output("nvrtcGetProgramLog", program)
            reason = first_line(ValueError(said.rstrip(b"\0").decode(errors="replace")))
            raise Unavailable(f"NVRTC {'.'.join(map(str, version()))} refuses: {reason}")
        return _output("nvrtcGetCUBIN", program)
    finally:
        own.nvrtcDestroyProgram(ctypes.byref(program))


def _output(name: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _call(f"{name}Size", program, ctypes.byref(size))
    found = ctypes.create_string_buffer(size.value)
    _call(name, program, found)
    return found.raw


def _call(name: str, *arguments: object) -> None:
    if status := getattr(library(), name)(*arguments):
        raise Unavailable(f"{name} of NVRTC {'.'.join(map(str, version()))} failed: error {status}")
