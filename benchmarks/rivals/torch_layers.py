"""torch's own operations on packed weights, on CPU.

Weight-only ones take bfloat16 input: in float32 and float16 they run a slow general loop.
`_int_mm` is the bare product, which leaves rounding x and scaling y to its caller, so it is a bound
on what can be made of it; `linear_dynamic` does all of it, with one scale for all rows of x.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from benchmarks.rivals.common import Layer, LayerBench, layer_bench

INT4_GROUPS = (32, 64, 128, 256)  # that _weight_int4pack_mm_for_cpu takes
INT_MM_SCALE = 1 / 32  # of x in int8: 127 is at 4 deviations


def layers(n: int, k: int, bits: str, group: int, copies: int, threads: int) -> list[LayerBench]:
    """The operations for a bitwidth ("16", "8:tc-li", "8", "4"); none, where torch has none."""
    torch.set_num_threads(threads)
    if bits == "16":
        return [_bfloat16(n, k, copies)]
    if bits == "8:tc-li":
        layer = Layer.draw(n, k, 8, -1, symmetric=True)
        return [
            _linear_dynamic(layer, copies),
            _int_mm(layer, copies, "(N, K)"),
            _int_mm(layer, copies, "(K, N)"),
        ]
    if bits == "8" and group == -1:
        return [_int8pack(Layer.draw(n, k, 8, -1, symmetric=True), copies)]
    if bits == "4" and group in INT4_GROUPS:
        return [_int4pack(Layer.draw(n, k, 4, group), copies)]
    return []


def _bfloat16(n: int, k: int, copies: int) -> LayerBench:
    weight = Layer.draw(n, k, 8, -1).dense().bfloat16()

    def copy(index: int) -> object:
        moved = weight.roll(index, 0)
        return lambda x: F.linear(x, moved)

    return layer_bench(
        "bfloat16 F.linear",
        "16",
        2 * n * k,
        weight.float(),
        [copy(i) for i in range(copies)],
        prepare=torch.Tensor.bfloat16,
        finish=lambda _, y: y,
    )


def _int4pack(layer: Layer, copies: int) -> LayerBench:
    """W = (code - 8) * scale + zero, with scale and zero as pairs, (K / group, N, 2) in bfloat16.

    Codes go in as int32, N a multiple of 16, K of 2; the second argument of packing is for GPUs.
    """

    def copy(index: int) -> object:
        moved = layer.rolled(index)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(moved.codes.int(), 1)
        zeros = (8 - moved.zeros.float()) * moved.scales
        pairs = torch.stack([moved.scales.t(), zeros.t()], 2).bfloat16().contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, layer.group, pairs)

    return layer_bench(
        f"_weight_int4pack_mm, group {layer.group}, bfloat16",
        "4",
        layer.size,
        layer.dense(),
        [copy(i) for i in range(copies)],
        prepare=torch.Tensor.bfloat16,
        finish=lambda _, y: y,
    )


def _int8pack(layer: Layer, copies: int) -> LayerBench:
    """Symmetric weights with a scale per output channel."""

    def copy(index: int) -> object:
        moved = layer.rolled(index)
        weight, scales = moved.signed(), moved.scales.view(-1).bfloat16()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, scales)

    return layer_bench(
        "_weight_int8pack_mm, per channel, bfloat16",
        "8",
        layer.size,
        layer.dense(),
        [copy(i) for i in range(copies)],
        prepare=torch.Tensor.bfloat16,
        finish=lambda _, y: y,
    )


def _linear_dynamic(layer: Layer, copies: int) -> LayerBench:
    def copy(index: int) -> object:
        moved = layer.rolled(index)
        scales = moved.scales.view(-1).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are deprecated
            weight = torch._make_per_channel_quantized_tensor(moved.signed(), scales, zeros, 0)
            packed = torch.ops.quantized.linear_prepack(weight, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    return layer_bench(
        f"quantized.linear_dynamic, {torch.backends.quantized.engine}",
        "8:tc-li",
        layer.size,
        layer.dense(),
        [copy(i) for i in range(copies)],
        prepare=lambda x: x,
        finish=lambda _, y: y,
    )


def _int_mm(layer: Layer, copies: int, layout: str) -> LayerBench:
    """The weight lies as (N, K) and goes in transposed, or it lies as (K, N)."""

    def copy(index: int) -> object:
        weight = layer.rolled(index).signed().t()
        if layout == "(K, N)":
            weight = weight.contiguous()
        return lambda x: torch._int_mm(x, weight)

    def prepare(x: torch.Tensor) -> torch.Tensor:
        return (x / INT_MM_SCALE).round().clamp(-127, 127).to(torch.int8)

    def finish(index: int, y: torch.Tensor) -> torch.Tensor:
        return y * INT_MM_SCALE * layer.scales.view(-1).roll(index, 0)

    return layer_bench(
        f"_int_mm alone, weight {layout}",
        "8:tc-li",
        layer.size,
        layer.dense(),
        [copy(i) for i in range(copies)],
        prepare=prepare,
        finish=finish,
    )
