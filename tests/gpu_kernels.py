"""The GPU kernels on a GPU, or on the CPU in Triton's interpreter: see the fixture `gpu`."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from cpu_paths import Weight, normal, random_weight
from fences import fenced, mappings
from torch import Tensor

from qllm.ops.gpu import cuda, decode, driver, hopper, hopper_int8, layout, linear, nvrtc
from qllm.ops.gpu import device as device_of
from qllm.quant.packing import PackedWeight


def packed(weight: Weight, device: str) -> PackedWeight:
    """A weight in the kernels' layout, made on the device."""
    stored = PackedWeight(*(tensor.to(device) for tensor in weight.stored[:3]))
    request = weight.request
    return layout.pack(stored, request.bits, request.group_size, request.in_features)


def multiply(
    weight: Weight,
    x: Tensor,
    bias: Tensor | None,
    device: str,
    product: Callable[..., Tensor] = linear.weight_only_linear,
    **options: object,
) -> Tensor:
    """x (M, K) times a weight, plus bias, on the device, by a product with options of its own."""
    tensors = packed(weight, device)[:3]
    bias = None if bias is None else bias.to(device)
    request = weight.request
    format_ = (request.out_features, request.bits, request.group_size)
    return product(x.to(device), *tensors, bias, *format_, **options).cpu()


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Both are the same to the bit, but for which NaN one is."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def build_emulation(name: str, folder: Path) -> ctypes.CDLL:
    """A driver whose GPU is emulated, of a source beside the tests.

    Kernels are compiled for ThreadSanitizer, in place of whose runtime is `emulated_order.cpp`.
    """
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose own folder this is in: the first builds for all
        folder = folder.parent.parent
    path = folder / Path(name).with_suffix(".so")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build_emulation(name, path)
    return ctypes.CDLL(str(path))


def _build_emulation(name: str, path: Path) -> None:
    sources, kernels = ROOT / "tests/ops/gpu", path.with_suffix(".o")
    # What glibc checks of jumps where it is fortified knows of one stack alone.
    compiler = ("g++", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-U_FORTIFY_SOURCE")
    flags = ("-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fno-threadsafe-statics")
    told = ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
    command = [*compiler, *flags, *told, f"-I{cuda.SOURCE}", "-c", str(sources / name)]
    subprocess.run([*command, "-o", str(kernels)], check=True)
    command = [*compiler, "-O3", "-shared", str(kernels), str(sources / "emulated_order.cpp")]
    subprocess.run([*command, "-o", str(path)], check=True)


def decode_binary(source: str, options: list[str], kernel: str) -> bytes:
    """A binary of the decode emulation's: the constants of either kernel."""
    assert options[:2] == ["--std=c++17", "--gpu-architecture=sm_90"]
    given = dict(option.removeprefix("-D").split("=") for option in options[2:])
    names = map(str.upper, decode.Variant._fields)
    return bytes(
        (ctypes.c_int * len(decode.Variant._fields))(*(int(given.get(n, 0)) for n in names))
    )


def emulate_hopper(library: ctypes.CDLL) -> None:
    """Make `emulated_prefill.cpp` the driver, and its constants what is compiled."""
    driver.library = lambda: library
    nvrtc.compile_cached = hopper_binary
    device_of.architecture = lambda device: ("9.0", 132)


def hopper_binary(source: str, options: list[str], kernel: str) -> bytes:
    """A binary of the emulation's: the constants of either kernel."""
    assert options[:2] == ["--std=c++17", "--gpu-architecture=sm_90a"]
    given = dict(option.removeprefix("-D").split("=") for option in options[2:])
    names = dict.fromkeys((*hopper.Variant._fields, *hopper_int8.Variant._fields))
    values = [int(given.pop(name.upper(), 0)) for name in names]
    assert not given
    return bytes((ctypes.c_int * len(values))(*values))


def multiply_between_fences(
    multiply: Callable[..., Tensor],
) -> Iterator[tuple[Callable[[Tensor], Tensor], int, int, int]]:
    """Multiply with all tensors fenced, those that it is given and the one that it makes.

    Yields:
        of each shape what fences a tensor, outputs, inputs and rows.
    """
    shapes = (((1, 1), 1), ((33, 67), 9), ((20, 390), 17))
    for at_end, ((outputs, inputs), count) in itertools.product((True, False), shapes):
        fence = partial(fenced, at_end=at_end)

        def new_empty(x, *shape, dtype=None, fence=fence):
            return fence(torch.zeros(*shape, dtype=dtype or x.dtype))

        torch.Tensor.new_empty = new_empty
        for bits, group, scheme in (
            (3, 32, "asym"),
            (4, -1, "sym"),
            (8, 20, "asym"),
            (5, 64, "sym"),
            (4, 32, "offset"),
        ):
            x = fence(normal(count, -(-inputs // 8) * 8, dtype=torch.float16))[:, :inputs]
            stored = random_weight((outputs, inputs), bits, group, scheme).stored
            tensors = map(fence, layout.pack(stored, bits, group, inputs)[:3])
            multiply(x, *tensors, fence(normal(outputs, dtype=torch.float16)), outputs, bits, group)
            mappings.clear()
        yield fence, outputs, inputs, count
