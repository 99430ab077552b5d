"""The product of a prompt with a packed weight: where there is no kernel in CUDA C++ (`hopper`), in
Triton, on GPUs whose Triton has tensor descriptors (TMA); and with a dense one.

Weights are rounded to the type of x, as the reference's are, and summed over all of K in one order.
In Triton, for few rows they become numbers in registers, which is where the matrix units take them
from; for many ("many_rows" of `tiles`) they do so once, in memory, from where a persistent product
takes them, whose programs go from tile to tile.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import cuda, hopper, nvrtc, tiles
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.layout import BLOCK, PANEL, Shape
from qllm.ops.gpu.rows import ALIGNED, aligned, side_by_side
from qllm.ops.gpu.self_test import packed_product
from qllm.ops.gpu.tiles import Tile

OLDEST = (9, 0)  # the first compute capability whose matrix units take tiles by descriptors
AT_ONCE = 64  # rows of the weight of which they are made
# Of the product of many rows: outputs, inputs of a step, warps and stages of a tile; and its rows,
# fewer where larger tiles would leave multiprocessors without one.
OUTPUTS, INPUTS, WARPS, STAGES, ROWS = 128, 64, 8, 3, (256, 128)
# What is tested: bits, types, offsets in place of zeros, and what is compared with large tiles:
# rows, and those of a tile.
CASES = (
    (4, torch.bfloat16, False, ((7, 0), (ROWS[0] + 3, 0), (ROWS[0] + 3, ROWS[1]))),
    (3, torch.float16, True, ((ROWS[0] + 3, 0),)),
)


@device_of.once
def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot run on a device; None where it can. Where a self-test fails a note says so."""
    if hopper.unsupported_reason(device) is None:
        return None
    if reason := _unfit(device):
        return reason
    instead = "prompts take a product that scales sums, a slower one"
    return device_of.failure("prefill", device, partial(_self_test, device), instead)


def _unfit(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it is for CUDA devices"
    architecture, _ = device_of.architecture(device)
    if tuple(map(int, architecture.split("."))) < OLDEST:
        return f"compute capability {architecture} is below {'.'.join(map(str, OLDEST))}"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "this Triton has no tensor descriptors"
    return None


def about(device: torch.device) -> str:
    """How prompts are multiplied, for `--explain`."""
    if hopper.unsupported_reason(device) is None:
        return f"prompts: CUDA C++ by NVRTC {'.'.join(map(str, nvrtc.version()))}"
    if reason := unsupported_reason(device):
        return f"prompts: sums are scaled: {reason}"
    return f"prompts: weights are rounded first, from {many_rows(device)} rows on in memory"


def many_rows(device: torch.device) -> int:
    """Rows from which on it pays to make numbers of the weight once."""
    return tiles.entry(device_of.architecture(device)[0], "prefill")["many_rows"]


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
    tile: int | None = None,
) -> Tensor:
    """`reference.weight_only_linear` for x of one of `cuda.DTYPES`, on tensors of `layout.pack`.

    Args:
        tile: rows of a tile, one of ROWS, of a weight that is dequantized in memory; 0: it is so in
            registers; None: what is fastest.
    """
    if tile is None and hopper.unsupported_reason(x.device) is None:
        format_ = (out_features, bits, group_size)
        return hopper.weight_only_linear(x, qweight, scales, qzeros, bias, *format_)
    shape = Shape.of(x.shape[1], out_features, group_size)
    x = shape.pad_groups(x) if shape.pads_groups else side_by_side(x)
    y = x.new_empty(len(x), out_features)
    if len(x) == 0:
        return y
    offsets = qzeros.is_floating_point()
    constants = {
        "BITS": bits,
        "SPAN": shape.span,
        "GROUP_BLOCKS": -(-shape.padded_size // BLOCK),
        "HAS_ZEROS": qzeros.numel() > 0 and not offsets,
        "OFFSETS": offsets,
    }
    weight = (qweight, scales, qzeros)
    if tile is None:
        tile = _rows_of_a_tile(y) if len(x) >= many_rows(x.device) else 0
    with device_of.current(x):
        if tile:
            _many(x, weight, bias, y, shape, constants, tile)
        else:
            _few(x, weight, bias, y, shape, constants)
    return y


def _rows_of_a_tile(y: Tensor) -> int:
    _, num_sms = device_of.architecture(y.device)
    return next((rows for rows in ROWS if _tiles_of(y, rows) >= num_sms), ROWS[-1])


def _tiles_of(y: Tensor, rows: int, columns: int = OUTPUTS) -> int:
    """Tiles of a result, with so many rows and columns each."""
    return -(-y.shape[0] // rows) * -(-y.shape[1] // columns)


def _few(
    x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, shape: Shape,
    constants: dict[str, Any],
) -> None:  # fmt: skip
    from qllm.ops.gpu.kernels.prefill_matmul import few_rows_matmul

    rows, outputs = y.shape
    tile = tiles.tile_of("prefill", rows, device_of.architecture(x.device)[0])
    few_rows_matmul[-(-rows // tile.rows), -(-outputs // tile.columns)](
        x, x.stride(0), *weight, bias, y, rows, x.shape[1], outputs, shape.blocks, shape.groups,
        **constants, HAS_BIAS=bias is not None, BM=tile.rows, BN=tile.columns,
        num_warps=tile.warps, num_stages=tile.stages,
        enable_fp_fusion=False,  # weights are the reference's
    )  # fmt: skip


def _many(
    x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, y: Tensor, shape: Shape,
    constants: dict[str, Any], tile: int,
) -> None:  # fmt: skip
    from qllm.ops.gpu.kernels.prefill_matmul import dequantize_weight

    numbers = x.new_empty(shape.panels * PANEL, shape.blocks * BLOCK)
    dequantize_weight[-(-len(numbers) // AT_ONCE), shape.blocks](
        *weight, numbers, shape.panels, shape.blocks, shape.groups,
        **constants, BN=AT_ONCE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _multiply(aligned(x), numbers, bias, y, Tile(tile, OUTPUTS, WARPS, STAGES))


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, tile: Tile) -> None:
    """The product of x (M, K) and a weight (N, K or more), both as tensor descriptors take them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from qllm.ops.gpu.kernels.prefill_matmul import many_rows_matmul

    (rows, outputs), (_, num_sms) = y.shape, device_of.architecture(x.device)
    programs = min(num_sms, _tiles_of(y, tile.rows, tile.columns))
    many_rows_matmul[(programs,)](
        TensorDescriptor.from_tensor(x, [tile.rows, INPUTS]),
        TensorDescriptor.from_tensor(weight, [tile.columns, INPUTS]),
        bias, y, rows, outputs, -(-weight.shape[1] // INPUTS), programs,
        HAS_BIAS=bias is not None, BM=tile.rows, BN=tile.columns, BK=INPUTS,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def takes_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether `dense_linear` multiplies such rows with such a weight."""
    described = weight.shape[1] % ALIGNED == 0 and weight.is_contiguous()
    aligned_so = weight.data_ptr() % (ALIGNED * weight.element_size()) == 0
    return x.dtype == weight.dtype and x.dtype in cuda.DTYPES and described and aligned_so


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, tile: Tile | None = None
) -> Tensor:
    """`reference.dense_linear` for what it `takes_dense`: one sum whatever the number of rows."""
    y = x.new_empty(len(x), len(weight))
    if tile is None:
        tile = tiles.tile_of("dense_prefill", len(x), device_of.architecture(x.device)[0])
        if len(x) > tile.rows:
            tile = tile._replace(rows=_rows_of_a_tile(y))
    if len(x):
        with device_of.current(x):
            _multiply(aligned(side_by_side(x)), weight, bias, y, tile)
    return y


@device_of.once
def dense_unsupported_reason(device: torch.device) -> str | None:
    """`unsupported_reason` of dense layers."""
    if reason := _unfit(device):
        return reason
    instead = "prompts' dense layers take a library's product beyond few rows"
    return device_of.failure("dense prefill", device, partial(_dense_self_test, device), instead)


def _self_test(device: torch.device) -> str | None:
    """Both ways beside the reference where sums are exact, beside each other where they are not.

    A prompt's last piece may be of few rows, and is to find what it would find among many.
    """
    for bits, dtype, offsets, counts in CASES:
        rows = ROWS[0] + 3
        tested = packed_product(device, (200, 328), rows, bits=bits, dtype=dtype, offsets=offsets)

        def multiply(x: Tensor, tile: int, weight: tuple[Any, ...] = tested.weight) -> Tensor:
            return weight_only_linear(x.to(device), *weight, tile=tile).cpu()

        calls = [(tested.exact, ROWS[0]), (tested.drawn, ROWS[0])]
        calls += [(tested.drawn[:n], tile) for n, tile in counts]
        found, whole, *others = device_of.together([partial(multiply, *call) for call in calls])
        if not torch.equal(found, tested.wanted):
            return "the self-test of prompts' products here found other sums"
        if not all(torch.equal(some, whole[: len(some)]) for some in others):
            return "few rows of a prompt and many found other sums in their self-test"
    return None


def _dense_self_test(device: torch.device) -> str | None:
    """The same of dense layers, in each kind of tile."""
    outputs, inputs, rows = 200, 328, ROWS[0] + 3
    exact = torch.arange(outputs * inputs).view(outputs, inputs).remainder(7).sub(3)
    whole = torch.arange(rows * inputs).view(rows, inputs).remainder(5).sub(2)
    draw = torch.Generator().manual_seed(0)
    some, weight = (torch.randn(count, inputs, generator=draw) for count in (rows, outputs))
    large = Tile(ROWS[0], OUTPUTS, WARPS, STAGES)
    for dtype, counts in ((torch.bfloat16, (7, 60, rows)), (torch.float16, (7,))):

        def multiply(x: Tensor, by: Tensor, tile: Tile | None, of: torch.dtype = dtype) -> Tensor:
            return dense_linear(x.to(device, of), by.to(device, of), None, tile=tile).cpu()

        few = [(some[:count], weight, None) for count in counts]
        calls = ((whole, exact, large), (some, weight, large), *few)
        found, many, *others = device_of.together([partial(multiply, *call) for call in calls])
        wanted = reference.dense_linear(whole.float(), exact.float(), None)
        if not torch.equal(found, wanted.to(dtype)):
            return "the self-test of prompts' dense products here found other sums"
        if not all(torch.equal(part, many[: len(part)]) for part in others):
            return "few rows and many found other dense sums in their self-test"
    return None
