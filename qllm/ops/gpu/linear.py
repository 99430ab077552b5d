"""Products of activations with packed, int8 and dense weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from qllm.ops import phase
from qllm.ops.gpu import cuda, decode, decode_int8, device, hopper_int8, prefill, tiles
from qllm.ops.gpu.layout import BLOCK, PANEL, Shape
from qllm.ops.gpu.rows import quantize, side_by_side
from qllm.ops.gpu.self_test import packed_product
from qllm.ops.reference import Int8Rows
from qllm.ops.reference import dense_linear as dense_reference

DENSE_BLOCK = 64
FEW_ROWS = 256  # beyond, a dense product is a library's work
# From which on a packed weight is unpacked in front of its product: to 16 bits, for shared memory
# does not hold enough tiles of it in float32.
MANY_ROWS = 512
UNPACKED_AT_ONCE = 64  # rows of the weight
# The kind of all products in float32, packed ones too: no matrix unit multiplies, and larger tiles
# fit neither into registers nor into shared memory.
FLOAT32 = "dense-float32"


def about() -> str:
    """What the kernel of packed weights does, for `--explain`."""
    gpu = torch.device("cuda", 0)
    if device.interpreting():
        return f"{device.about()}; integers times activations, one scale to a block's sum"
    return f"{device.about()}; {prefill.about(gpu)}; {decode.about(gpu)}"


def about_int8() -> str:
    """The same of `int8_linear`."""
    product = f"{device.about()}; int8 x int8 -> int32 on the matrix units"
    if device.interpreting():
        return product
    gpu = torch.device("cuda", 0)
    return f"{product}; {hopper_int8.about(gpu)}; {decode_int8.about(gpu)}"


def weight_only_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`reference.weight_only_linear` on tensors of `layout.pack`."""
    offsets = qzeros.is_floating_point()
    own = phase.decoding() and x.dtype in cuda.DTYPES
    if own and not decode.unsupported_reason(x.device, offsets=offsets):
        packed = (qweight, scales, qzeros)
        return decode.weight_only_linear(x, *packed, bias, out_features, bits, group_size)
    if not phase.decoding() and x.dtype in cuda.DTYPES and not prefill.unsupported_reason(x.device):
        packed = (qweight, scales, qzeros)
        return prefill.weight_only_linear(x, *packed, bias, out_features, bits, group_size)
    from qllm.ops.gpu.kernels.matmul import packed_matmul, unpack_weight

    shape = Shape.of(x.shape[1], out_features, group_size)
    x = shape.pad_groups(x) if shape.pads_groups else side_by_side(x)
    constants = {
        "BITS": bits,
        "SPAN": shape.span,
        "GROUP_BLOCKS": -(-shape.padded_size // BLOCK),
        "HAS_ZEROS": qzeros.numel() > 0 and not offsets,
        "OFFSETS": offsets,
    }
    many = len(x) >= MANY_ROWS and x.dtype != torch.float32
    if many:  # for which it pays to take the integers out of the words but once
        unpacked = x.new_empty(shape.panels * PANEL, shape.blocks * BLOCK)
        grid = (-(-len(unpacked) // UNPACKED_AT_ONCE), shape.blocks)
        sizes = (shape.panels, shape.blocks, shape.groups)
        with device.current(x):
            unpack_weight[grid](
                qweight,
                scales,
                qzeros,
                unpacked,
                *sizes,
                **constants,
                BN=UNPACKED_AT_ONCE,
                num_warps=4,
                enable_fp_fusion=False,  # weights with offsets are the reference's
            )
        qweight = unpacked
    constants["UNPACKED"] = many
    return _multiply(
        packed_matmul,
        FLOAT32 if x.dtype == torch.float32 else f"packed-{bits}",
        (x, x.stride(0), qweight, scales, qzeros),
        bias,
        (x.shape[1], out_features, shape.blocks),
        (shape.blocks, shape.groups),
        constants,
    )


@device.once
def offsets_unsupported_reason(device_type: str) -> str | None:
    """Why no kernel takes weights with offsets on a device, by its type; None where one does."""
    if device_type != "cuda":
        return None
    instead = "weights with an offset per group are dequantized for each product"
    here = torch.device(device_type, 0)
    return device.failure("offsets", here, partial(_self_test, here), instead)


def _self_test(gpu: torch.device) -> str | None:
    """Prompts of few and of many rows times a weight with offsets, whose sums are exact."""
    tested = packed_product(gpu, (80, 96), MANY_ROWS, group_size=32, offsets=True)
    for rows in (7, MANY_ROWS):
        found = weight_only_linear(tested.exact[:rows].to(gpu), *tested.weight)
        if not torch.equal(found.cpu(), tested.wanted[:rows]):
            return "the self-test of weights with offsets here found other sums"
    return None


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.dense_linear`."""
    prompt = not phase.decoding() and prefill.takes_dense(x, weight)
    if prompt and not prefill.dense_unsupported_reason(x.device):
        return prefill.dense_linear(x, weight, bias)
    # A library's sums depend on the number of rows, which those of a step, whose work the heads of
    # prompts are as well, must not.
    few = len(x) <= FEW_ROWS or phase.decoding()
    return (few_rows_dense_linear if few else dense_reference)(x, weight, bias)


def about_dense() -> str:
    """The same of `dense_linear`."""
    beyond = f"a library's product of prompts beyond {FEW_ROWS} rows"
    if device.interpreting():
        return f"{device.about()}; {beyond}"
    if reason := prefill.dense_unsupported_reason(torch.device("cuda", 0)):
        return f"{device.about()}; {beyond}: {reason}"
    return f"{device.about()}; prompts by tensor descriptors; else {beyond}"


def few_rows_dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.dense_linear` for few rows."""
    from qllm.ops.gpu.kernels.matmul import dense_matmul

    x, weight = side_by_side(x), weight.to(x.dtype).contiguous()
    inputs, outputs = x.shape[1], len(weight)
    return _multiply(
        dense_matmul,
        FLOAT32 if x.dtype == torch.float32 else "dense",
        (x, x.stride(0), weight),
        bias,
        (inputs, outputs, -(-inputs // DENSE_BLOCK)),
        (),
        {"BK": DENSE_BLOCK},
    )


def int8_linear(
    x: Tensor | Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_features: int,
) -> Tensor:
    """`reference.int8_linear`."""
    x = x if isinstance(x, Int8Rows) else quantize(x, input_scale)
    if decode_int8.takes(x, qweight) and not decode_int8.unsupported_reason(x.values.device):
        return decode_int8.int8_linear(x, qweight, scales, bias)
    if hopper_int8.takes(x, qweight) and not hopper_int8.unsupported_reason(x.values.device):
        return hopper_int8.int8_linear(x, qweight, scales, bias)
    from qllm.ops.gpu.kernels.matmul import int8_matmul

    q, x_scales, dtype = x
    inputs, outputs = qweight.shape[1], len(qweight)
    return _multiply(
        int8_matmul,
        "int8",
        (q, x_scales, qweight, scales),
        bias,
        (inputs, outputs, -(-inputs // BLOCK)),
        (),
        {"BK": BLOCK, "PER_ROW": x_scales.dim() > 0},
        dtype,
    )


def _multiply(
    kernel: Any,
    kind: str,
    operands: tuple,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    extra: tuple[int, ...],
    constants: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Launch a product.

    Args:
        operands: what the kernel takes first, x in front.
        shape: inputs, outputs and blocks of the weight.
        extra: what it takes after inputs and outputs.
        dtype: of the result; None: that of x.
    """
    x = operands[0]
    rows, (inputs, outputs, blocks) = len(x), shape
    y = x.new_empty(rows, outputs, dtype=dtype or x.dtype)
    if rows == 0:
        return y
    architecture = device.architecture(x.device)
    tile, split_k, parallel = tiles.plan(kind, rows, outputs, blocks, *architecture)
    grid = (-(-rows // tile.rows), -(-outputs // tile.columns), split_k if parallel else 1)
    assert grid[0] * grid[1] <= device.MAX_TILES or not parallel
    partials = counters = None
    if parallel:
        size = grid[0] * grid[1] * split_k * tile.rows * tile.columns
        sum_dtype = torch.int32 if x.dtype == torch.int8 else torch.float32
        partials, counters = x.new_empty(size, dtype=sum_dtype), device.counters(x.device)
    with device.current(x):
        kernel[grid](
            *operands,
            bias,
            y,
            partials,
            counters,
            rows,
            inputs,
            outputs,
            *extra,
            **constants,
            HAS_BIAS=bias is not None,
            BM=tile.rows,
            BN=tile.columns,
            SPLIT_K=split_k,
            PARALLEL=parallel,
            num_warps=tile.warps,
            num_stages=tile.stages,
            # The reference rounds each step of what is exact so far, and of weights with offsets.
            enable_fp_fusion=x.dtype != torch.int8 and not constants.get("OFFSETS"),
        )
    return y
