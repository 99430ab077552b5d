"""One linear layer of a shape: packed, int8 and dense, and what torch has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.ways import SYSTEM, through
from qllm.cli import note
from qllm.config import DEFAULT_ALGORITHM, QuantSpec
from qllm.layers import linear_class
from qllm.layers.base import Linear
from qllm.ops import phase
from qllm.ops.gpu.limits import seconds
from qllm.quant.packing import packed_size

# Weights with an offset per group, as GGUF files have them.
OF_GGUF = {
    f"q{bits}_1": QuantSpec(bits, 32, "offset", "weight_only", DEFAULT_ALGORITHM) for bits in (4, 5)
}
GROUP = 128
WORKING_SET = 4  # times the cache, so that a weight comes from memory
DEVIATION = 0.02  # of the weights
MAX_COPIES = 64
DECODE_ROWS = 16


class Bench(NamedTuple):
    """A layer in several copies, whose weights together do not fit into the cache.

    Attributes:
        size: bytes of a copy's weight.
        rate: which of the machine's rates its products are measured against.
        runs: multiply x by a copy, one each.
    """

    name: str
    size: int
    rate: str
    runs: list[Callable[[Tensor], object]]


def random_layer(
    inputs: int, outputs: int, bitwidth: str, dtype: torch.dtype, device: torch.device
) -> Linear:
    """A layer of integers that are drawn, in its kernel's layout."""
    spec = OF_GGUF.get(bitwidth) or QuantSpec.parse(bitwidth)
    empty = linear_class(spec).empty(inputs, outputs, False, spec, dtype)
    fill_buffers(empty, device)
    return empty


def fill_buffers(module: nn.Module, device: torch.device) -> None:
    """Draw what a module itself holds, and let it take its kernel's layout."""
    for name, tensor in dict(module.named_buffers(recurse=False)).items():
        if tensor.is_meta:
            setattr(module, name, fill(name, tensor, device))
    if isinstance(module, Linear):
        module.process_weights_after_loading()


def fill(name: str, like: Tensor, device: torch.device) -> Tensor:
    """Values for a buffer of a layer or norm."""
    if like.dtype in (torch.uint8, torch.int8):
        low, high = (0, 256) if like.dtype == torch.uint8 else (-128, 128)
        if name == "qzeros":
            low, high = 7, 10
        return torch.randint(low, high, like.shape, device=device).to(like.dtype)
    if name == "scales":
        return torch.full(like.shape, DEVIATION / 8, dtype=like.dtype, device=device)
    return (torch.randn(like.shape, device=device) * DEVIATION).to(like.dtype)


def ours(
    bitwidth: str, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, cache: int,
    ways: Sequence[str] = (SYSTEM,),
) -> Iterator[Bench]:  # fmt: skip
    """A layer of this package, in each of some of the `ways` that it has."""
    first = random_layer(inputs, outputs, bitwidth, dtype, device)
    layers = [first]
    layers += [
        random_layer(inputs, outputs, bitwidth, dtype, device)
        for _ in range(copies(first.nbytes(), cache) - 1)
    ]
    rate = "int8" if bitwidth.startswith("8:tc") else "bfloat16"
    for way in ways:
        name = f"qllm {bitwidth}" + (f", {way}" if way != SYSTEM else "")
        yield Bench(name, first.nbytes(), rate, [through(way, layer.forward) for layer in layers])


def of_torch(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, cache: int
) -> Iterator[Bench]:
    """What torch has: its dense product, and that of 4 bits where it runs."""
    size = inputs * outputs * dtype.itemsize
    like = torch.empty(outputs, inputs, dtype=dtype, device="meta")
    weights = [fill("weight", like, device) for _ in range(copies(size, cache))]
    runs = [lambda x, w=w: F.linear(x, w) for w in weights]
    yield Bench(f"torch {str(dtype).removeprefix('torch.')}", size, "bfloat16", runs)
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    size = packed_size(inputs, 4) * outputs + inputs // GROUP * outputs * 4
    pairs = torch.randint(0, 256, (outputs, inputs // 2), device=device).to(torch.uint8)
    try:
        packed = torch._convert_weight_to_int4pack(pairs, 8)
    except RuntimeError as error:
        note(f"torch's product of 4 bits is left out: {error}")
        return
    scales = torch.ones(inputs // GROUP, outputs, 2, dtype=dtype, device=device)
    weights = [packed.clone() for _ in range(copies(size, cache))]
    runs = [lambda x, w=w: torch._weight_int4pack_mm(x, w, GROUP, scales) for w in weights]
    yield Bench("torch int4pack 4", size, "bfloat16", runs)


def of_gemlite(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, cache: int
) -> Iterator[Bench]:
    """GemLite's product of 4 bits, where GemLite is installed (0.6 was tried)."""
    from gemlite.core import DType, GemLiteLinear

    kind = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16}[dtype]
    size = packed_size(inputs, 4) * outputs + inputs // GROUP * outputs * 4
    runs = []
    for _ in range(copies(size, cache)):
        layer = GemLiteLinear(4, GROUP, inputs, outputs, input_dtype=kind, output_dtype=kind)
        values = torch.randint(0, 16, (outputs, inputs), device=device).to(torch.uint8)
        scales = torch.full((outputs, inputs // GROUP), DEVIATION / 8, dtype=dtype, device=device)
        layer.pack(values, scales, torch.full_like(scales, 8), None)
        runs.append(layer)
    yield Bench("GemLite 4", size, "bfloat16", runs)


RIVALS: dict[str, Callable[..., Iterator[Bench]]] = {"torch": of_torch, "gemlite": of_gemlite}


def copies(size: int, cache: int) -> int:
    """How many of some bytes are far more than a cache of some holds."""
    return min(MAX_COPIES, max(2, -(-WORKING_SET * cache // size)))


def measure(
    bench: Bench, shape: tuple[int, int], rows: int, limits: dict[str, float], dtype: torch.dtype,
    device: torch.device, repeats: int,
) -> dict[str, object]:  # fmt: skip
    """Times of a product, and their share of what the machine allows.

    Up to DECODE_ROWS rows it is that of a decode step, beyond that of a prompt.
    """
    inputs, outputs = shape
    x = torch.randn(rows, inputs, device=device).to(dtype)
    calls = [lambda run=run: run(x) for run in bench.runs]
    step = phase.decode() if rows <= DECODE_ROWS else nullcontext()
    with torch.inference_mode(), step:
        taken = seconds(calls, device, repeats)
    read, done = bench.size / taken, 2 * rows * inputs * outputs / taken
    return {
        "layer": f"{outputs}x{inputs}",
        "rows": rows,
        "name": bench.name,
        "microseconds": taken * 1e6,
        "gigabytes_per_second": read / 1e9,
        "of_bandwidth": read / limits["bandwidth"],
        "teraops_per_second": done / 1e12,
        "of_arithmetic": done / limits[bench.rate],
    }
