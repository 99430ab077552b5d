"""The product of a prompt with a packed weight on Hopper's matrix units, in CUDA C++.

Weights become numbers in registers, from where those units take them, while they multiply the last
ones, and activations come to shared memory by copies that run on their own. It serves all numbers
of rows, in one order of sums. NVRTC compiles it for what a layer needs when one first asks for it.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qllm.ops.gpu import cuda, driver, nvrtc
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.layout import BLOCK, PANEL, Shape
from qllm.ops.gpu.rows import aligned
from qllm.ops.gpu.self_test import packed_product

CAPABILITY = "9.0"  # of compute capability, the only one
SOURCE = ("prefill", "hopper.h", "ring.h", "prefill_words.h", "prefill_weights.h")
THREADS = 384
STAGE = 64  # inputs of x


class Tile(NamedTuple):
    """Rows and outputs of a block of threads."""

    rows: int
    outputs: int


# Microseconds that an H100 took for BLOCK inputs of a tile, and beside these for a tile.
BLOCK_TIME = {
    Tile(64, 64): 0.5,
    Tile(64, 128): 0.75,
    Tile(128, 64): 0.6,
    Tile(128, 128): 0.92,
    Tile(192, 128): 1.16,
    Tile(256, 128): 1.42,
}
TILE_TIME = 7
TILES = tuple(BLOCK_TIME)
OUTPUTS = 128  # by which a weight's parts are chosen
PARTS, MIN_BLOCKS = (1, 2, 4, 8), 4  # of the inputs, which a cluster has; and of a part
SHARED_BYTES = 227 << 10
ROW_BYTES = 128  # of a tile of words in shared memory, whose swizzle begins anew at each SWIZZLE
SWIZZLE = 1024
X_BYTES = 160 << 10  # up to which stages of x take shared memory
MAX_STAGES, MAX_W_STAGES = 8, 4
# What is tested: bits, types of x and of scales, offsets in place of zeros, and tiles.
CASES = (
    (4, torch.bfloat16, torch.float16, False, TILES),
    (3, torch.float16, torch.float16, True, (Tile(256, 128),)),
    (8, torch.bfloat16, torch.float32, False, (Tile(128, 128),)),
)
TESTED = (200, 4168)  # outputs and inputs, of which there are several parts


class Variant(NamedTuple):
    """The constants of the kernel; see prefill.cu."""

    bits: int
    float16: bool
    zeros: bool
    offsets: bool
    wide: bool
    group: int
    rows: int
    x_stages: int
    w_stages: int
    outputs: int

    @property
    def w_bytes(self) -> int:
        """Of a stage of the weight."""
        scale = 4 if self.wide else 2
        zero = scale if self.offsets else int(self.zeros)
        groups = BLOCK // self.group * self.outputs * (scale + zero)
        return self.outputs // PANEL * _whole(256 * self.bits) + _whole(groups)

    @property
    def shared_bytes(self) -> int:
        """Of a block of threads."""
        ring = self.x_stages * self.rows * STAGE * 2 + self.w_stages * self.w_bytes
        return max(ring + 16 * (self.x_stages + self.w_stages), self.rows * (self.outputs + 4) * 4)


def _whole(size: int) -> int:
    """Bytes in shared memory of so many that lie with a swizzle."""
    return -(-size // SWIZZLE) * SWIZZLE


class Arguments(ctypes.Structure):
    """The kernel's, as in prefill.cu."""

    _fields_ = (
        *((name, driver.TensorMap) for name in ("x", "q", "scales", "zeros")),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("groups_of_a_block", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("rows", "outputs", "blocks", "parts")),
        ("filled", ctypes.c_char * 24),  # up to a multiple of the alignment
    )


def capability_reason(device: torch.device) -> str | None:
    """Why kernels for Hopper do not run on a device; None where they do."""
    if device.type != "cuda":
        return "it is for CUDA devices"
    architecture, _ = device_of.architecture(device)
    if architecture != CAPABILITY:
        return f"it is for compute capability {CAPABILITY}, not for {architecture}"
    return None


@device_of.once
def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot run on a device; None where it can. Where a self-test fails a note says so."""
    if reason := capability_reason(device):
        return reason
    instead = "prompts take Triton's product, a slower one"
    test = partial(_self_test, device)
    return device_of.failure("prompts in CUDA C++", device, test, instead, nvrtc.version)


def variant(
    bits: int, dtype: torch.dtype, scales: Tensor, qzeros: Tensor, group: int, tile: Tile
) -> Variant:
    """The kernel's for tiles of a size, with as many stages as shared memory holds."""
    offsets = qzeros.is_floating_point()
    zeros = qzeros.numel() > 0 and not offsets
    wide = scales.dtype == torch.float32
    x_stages = min(MAX_STAGES, X_BYTES // (tile.rows * STAGE * 2))
    kind = (bits, dtype == torch.float16, zeros, offsets, wide, group)
    made = Variant(*kind, tile.rows, x_stages, MAX_W_STAGES, tile.outputs)
    while made.shared_bytes > SHARED_BYTES:
        made = made._replace(w_stages=made.w_stages - 1)
    return made


def at_once(cluster: int, num_sms: int) -> int:
    """Blocks of threads that run at once: large clusters leave multiprocessors of a GPC over."""
    return num_sms if cluster <= 2 else num_sms * 10 // 11


def parts_of(tiles: int, blocks: int, num_sms: int) -> int:
    """Into how many parts the inputs are cut: it depends on the weight and the GPU alone.

    Args:
        tiles: of OUTPUTS outputs each.
    """
    counts = [count for count in PARTS if blocks >= MIN_BLOCKS * count]
    fitting = [count for count in counts if tiles * count <= at_once(count, num_sms)]
    return max(fitting, default=1)


def tile_for(rows: int, outputs: int, blocks: int, parts: int, num_sms: int) -> Tile:
    """That with which the last multiprocessor is done first."""

    def time(tile: Tile) -> float:
        tiles = -(-rows // tile.rows) * -(-outputs // tile.outputs)
        waves = -(-tiles * parts // at_once(parts, num_sms))
        return waves * (blocks / parts * BLOCK_TIME[tile] + TILE_TIME)

    return min(TILES, key=time)


@cache
def kernel(
    source: tuple[str, ...], constants: NamedTuple, shared_bytes: int, device: torch.device
) -> ctypes.c_void_p:
    """A kernel, compiled for a device.

    Args:
        source: what `cuda.source` takes; the first part has the kernel's name.
        shared_bytes: of a block of threads.
    """
    target = f"--gpu-architecture=sm_{CAPABILITY.replace('.', '')}a"
    options = ["--std=c++17", target, *cuda.options(constants)]
    binary = nvrtc.compile_cached(cuda.source(*source), options, source[0])
    function = driver.load(binary, device, source[0])
    driver.allow_shared(function, shared_bytes)
    return function


def weight_only_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`reference.weight_only_linear` for x of one of `cuda.DTYPES`, on tensors of `layout.pack`.

    Args:
        tile: one of TILES; None: as `tile_for` says.
    """
    shape = Shape.of(x.shape[1], out_features, group_size)
    x = _apart(shape.pad_groups(x) if shape.pads_groups else x)
    y = x.new_empty(len(x), out_features)
    if len(x) == 0:
        return y
    _, num_sms = device_of.architecture(x.device)
    outputs = shape.panels * PANEL
    parts = parts_of(-(-outputs // OUTPUTS), shape.blocks, num_sms)
    tile = tile or tile_for(len(x), outputs, shape.blocks, parts, num_sms)
    constants = variant(bits, x.dtype, scales, qzeros, shape.span, tile)
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    zeros = qzeros if qzeros.numel() else scales  # which then no one reads
    addresses = tuple((part.data_ptr(), part.element_size()) for part in (qweight, scales, zeros))
    with device_of.current(x):
        arguments = Arguments(
            _map_of_rows(x, tile.rows),
            *_weight_maps(addresses, shape, bits, tile.outputs, x.device),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            -(-(1 << 32) // -(-shape.padded_size // BLOCK)),
            len(x),
            out_features,
            shape.blocks,
            parts,
        )
        driver.launch(
            kernel(SOURCE, constants, constants.shared_bytes, x.device),
            (parts * -(-len(x) // tile.rows), -(-outputs // tile.outputs)),
            THREADS,
            arguments,
            x.device,
            early=False,
            cluster=parts,
            shared_bytes=constants.shared_bytes,
        )
    return y


def _apart(x: Tensor) -> Tensor:
    """x (M, K) `aligned`, no row of which lies in another one."""
    x = aligned(x)
    return x if x.stride(0) >= x.shape[1] or len(x) == 1 else x.contiguous()


def _map_of_rows(x: Tensor, rows: int) -> driver.TensorMap:
    """The tensor map of x (M, K), in tiles of some rows."""
    stride = max(x.stride(0), x.shape[1]) * x.element_size()
    shape, tile = (len(x), x.shape[1]), (rows, STAGE)
    return driver.tensor_map(x.data_ptr(), 2, shape, stride, tile, x.device, swizzle=True)


@lru_cache(maxsize=1 << 14)
def _weight_maps(
    addresses: tuple[tuple[int, int], ...],
    shape: Shape,
    bits: int,
    outputs: int,
    device: torch.device,
) -> list[driver.TensorMap]:
    """Those of a weight, its scales and its zeros, by where they begin and sizes of numbers.

    Args:
        outputs: of a tile.
    """
    (q, _), *groups = addresses
    rows, words = 256 * bits // ROW_BYTES, ROW_BYTES // 8  # of a block of a panel
    size = (shape.panels * shape.blocks * rows, words)
    made = [driver.tensor_map(q, 8, size, ROW_BYTES, (rows, words), device, swizzle=True)]
    size, tile = (shape.groups, shape.panels * PANEL), (BLOCK // shape.span, outputs)
    for address, width in groups:
        made.append(driver.tensor_map(address, width, size, size[1] * width, tile, device))
    return made


def _self_test(device: torch.device) -> str | None:
    """Products beside the reference where sums are exact, and beside each other where they are not.

    What no emulation shows is here: how the matrix units read shared memory, and that they, the
    copies and the threads wait for each other. A row alone is to find what it finds among many.
    """
    rows = max(tile.rows for tile in TILES) + 3
    for bits, dtype, wide, offsets, sizes in CASES:
        tested = packed_product(
            device, TESTED, rows, bits=bits, dtype=dtype, scales_dtype=wide, offsets=offsets
        )

        def multiply(x: Tensor, tile: Tile, weight: tuple[Any, ...] = tested.weight) -> Tensor:
            return weight_only_linear(x.to(device), *weight, tile=tile).cpu()

        calls = [(tested.exact, tile) for tile in sizes]
        calls += [(some, tile) for some in (tested.drawn, tested.drawn[-1:]) for tile in sizes]
        found = device_of.together([partial(multiply, *call) for call in calls])
        sums, many, one = (
            found[first : first + len(sizes)] for first in (0, len(sizes), 2 * len(sizes))
        )
        if not all(torch.equal(each, tested.wanted) for each in sums):
            return "the self-test of prompts' products in CUDA C++ here found other sums"
        same = all(torch.equal(each, many[0]) for each in many)
        if not same or not all(torch.equal(each, many[0][-1:]) for each in one):
            return "few rows of a prompt and many found other sums in their self-test in CUDA C++"
    return None
