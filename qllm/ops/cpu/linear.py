"""Packed, int8 and dense weights times activations."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.ops import phase
from qllm.ops.cpu import library
from qllm.ops.cpu.interface import (
    Blocks,
    Dense,
    Distinct,
    EmbedPacked,
    Factoring,
    Linear,
    Packing,
)
from qllm.ops.cpu.library import TYPES, Arena, like, pointer
from qllm.quant.packing import PackedWeight, group_width, packed_size, scheme_of

LANES, K_BLOCK, VECTOR = 16, 32, 64  # of the layout, as in kernels.h
SMALLEST_GROUP = 16  # two to a K block; of other sizes every group is filled up to one
# What takes the place of float32 in scales that are products, and in those that are powers of two.
FACTORED, POWERS = torch.int8, torch.uint8
SCALE_TYPES = {**TYPES, FACTORED: 3, POWERS: 4}
MANTISSA_BITS, INFINITE = 23, 255  # of float32, and the exponent of numbers that are not finite
# Integers of more bits, which in some types are 16 different ones at the most, are held in
# LEVEL_BITS then; and from how many weights on it is tried.
LEVEL_BITS, MANY_WEIGHTS = 4, 1 << 14
# Groups whose scales may be either, and how many inputs have a factor.
COMPACT_GROUPS, FACTORED_INPUTS = (16, 32), 256
WEIGHT_ONLY, WEIGHT_ONLY_INT8, INT8_DYNAMIC, INT8_STATIC = range(4)


def about() -> str:
    """What the kernels do, for `--explain`."""
    return _by_phase("activations as integers, exact sums within a group")


def about_int8_weights() -> str:
    """The same of `int8_linear`."""
    return f"{library.about()}; activations as int8, exact sums"


def about_int8() -> str:
    """The same of `weight_only_linear_int8`."""
    return _by_phase("activations as int8, exact sums within a block of 128 inputs", "int8, then ")


def _by_phase(integers: str, first: str = "") -> str:
    """What the kernels do, where it is `integers` in all phases but perhaps the prefill.

    Args:
        first: what becomes of activations there before they are bfloat16.
    """
    if library.library().path == "amx":
        # As `is_bf16_prefill` in prefill_amx.h decides.
        operands = f"activations as {first}bfloat16, weights as bfloat16"
        prefill = f"prefill of bfloat16 and float16: {operands}, sums in float32"
        integers = f"{prefill}; decode: {integers}"
    return f"{library.about()}; {integers}"


def unsupported_reason(device: str, in_features: int, group_size: int) -> str | None:
    """Why a layer cannot run here, None where it can."""
    if 0 < group_size < min(SMALLEST_GROUP, in_features):
        return f"groups of fewer than {SMALLEST_GROUP} inputs"
    return library.unsupported_reason(device)


_arena = Arena()


def _shape(in_features: int, bits: int, group_size: int) -> tuple[int, int, int]:
    """Group size, groups and K blocks of a row."""
    group = group_width(in_features, group_size)
    filled = K_BLOCK if group == K_BLOCK // 2 else group
    full, rest = divmod(in_features, filled)
    k_blocks = full * -(-filled // K_BLOCK) + -(-rest // K_BLOCK)
    return group, -(-in_features // group), k_blocks


def packed_nbytes(weight: PackedWeight, bits: int, group_size: int, in_features: int) -> int:
    """Bytes of what `pack` makes of a weight, which may be on the meta device, at the most: what it
    finds in the values is not known there."""
    _, groups, k_blocks = _shape(in_features, bits, group_size)
    of_group = sum(tensor.dtype.itemsize for tensor in weight[1:3] if tensor.numel())
    panel = k_blocks * bits * VECTOR + groups * LANES * of_group
    return -(-len(weight.qweight) // LANES) * panel


def pack(weight: PackedWeight, bits: int, group_size: int, in_features: int) -> PackedWeight:
    """A weight (N, K) in the kernels' layout.

    Returns:
        qweight uint8 (ceil(N / 16), K blocks, bits, 64), a K block being 32 inputs of a group or
        the rest of it; scales (ceil(N / 16), G, 16) and qzeros, uint8 or offsets, of that shape, or
        empty. Scales and offsets of float32 that are products of few numbers and integers of 8
        bits, as llama.cpp's K types have them, become int8: FACTORED in kernels.h; and scales that
        are powers of two, as MXFP4 has them, uint8: POWERS. Integers of 5 to 8 bits that are few
        different ones (MXFP4, llama.cpp's IQ types) are levels: qweight has one dimension then,
        4 bits to an input, and the levels behind them, a VECTOR long.
    """
    group, groups, k_blocks = _shape(in_features, bits, group_size)
    out_features = len(weight.qweight)
    panels = -(-out_features // LANES)
    rows, scales, zeros = (tensor.contiguous() for tensor in weight[:3])
    grid = (panels, groups, LANES)
    levels = _levels(rows, bits, in_features)
    if levels is None:
        q = _arena.empty((panels, k_blocks, bits, VECTOR), rows.dtype)
    else:
        q = _arena.empty((panels * k_blocks * LEVEL_BITS * VECTOR + VECTOR,), rows.dtype)
        q[-VECTOR:] = levels
    compact = _powers(scales, zeros, group) or _factored(scales, zeros, group)
    own_scales = compact[0] if compact else _arena.empty(grid, scales.dtype)
    own_zeros = zeros
    if compact and scheme_of(zeros) == "offset":
        own_zeros = compact[-1]
    elif zeros.numel():
        own_zeros = _arena.empty(grid, zeros.dtype)
    packed = PackedWeight(q, own_scales, own_zeros)
    _move(
        "pack",
        (in_features, out_features, bits, group),
        (rows, scales, zeros),
        packed,
    )
    return packed


def _levels(rows: Tensor, bits: int, in_features: int) -> Tensor | None:
    """The different integers of rows of bits, uint8 (VECTOR,), the first LANES of which count.

    None where they are more, or there is little to save.
    """
    if bits <= LEVEL_BITS or len(rows) * in_features < MANY_WEIGHTS:
        return None
    found = torch.zeros(256, dtype=torch.uint8)
    shape = (in_features, len(rows), bits)
    distinct = Distinct(*shape, pointer(rows), rows.shape[1], pointer(found))
    library.run("distinct", distinct, rows, found)
    levels = found.nonzero().flatten().to(torch.uint8)
    return None if len(levels) > LANES else pad(levels, (0, VECTOR - len(levels)))


def _levels_of(qweight: Tensor) -> Tensor | None:
    """Those of `pack`."""
    return qweight[-VECTOR:] if qweight.dim() == 1 else None


def _factored(scales: Tensor, zeros: Tensor, group: int) -> list[Tensor] | None:
    """Scales (N, G), and offsets if there are any, as FACTORED ones.

    None where they are not products of such integers, or would not become smaller.
    """
    numbers = [scales, *([zeros] if scheme_of(zeros) == "offset" else [])]
    if scales.dtype != torch.float32 or group not in COMPACT_GROUPS:
        return None
    rows, groups = scales.shape
    count = FACTORED_INPUTS // group
    shape = (-(-rows // LANES), -(-groups // count), 4 + count, LANES)
    if shape[1] * shape[2] >= 4 * groups:
        return None
    found = []
    for each in numbers:
        factored, failed = torch.empty(shape, dtype=FACTORED), torch.zeros(1, dtype=torch.int64)
        tensors = (each, factored, failed)
        library.run("factor", Factoring(rows, groups, group, *map(pointer, tensors)), *tensors)
        if failed.item():
            return None
        found.append(factored)
    return [_arena.empty(shape, FACTORED).copy_(factored) for factored in found]


def _powers(scales: Tensor, zeros: Tensor, group: int) -> list[Tensor] | None:
    """Scales (N, G) as the exponents of POWERS; None where some are no powers of two."""
    if scales.dtype != torch.float32 or group not in COMPACT_GROUPS or scheme_of(zeros) == "offset":
        return None
    bits = scales.view(torch.int32)
    exponents = bits >> MANTISSA_BITS  # of negative numbers, negative
    fits = (exponents > 0) & (exponents < INFINITE) & (exponents << MANTISSA_BITS == bits)
    if not fits.all():
        return None
    rows, groups = scales.shape
    panels = -(-rows // LANES)
    filled = pad(exponents.to(POWERS), (0, 0, 0, panels * LANES - rows))
    grid = filled.view(panels, LANES, groups).transpose(1, 2)
    return [_arena.empty(grid.shape, POWERS).copy_(grid)]


def _numbers(powers: Tensor, rows: int) -> Tensor:
    """The numbers (N, G) of POWERS."""
    exponents = powers.transpose(1, 2).flatten(0, 1)[:rows].int()
    return (exponents << MANTISSA_BITS).view(torch.float32)


def _products(factored: Tensor, rows: int, groups: int) -> Tensor:
    """The numbers (N, G) of FACTORED ones."""
    panels, parts, count, _ = factored.shape
    count -= 4
    factors = factored[:, :, :4].flatten(2).view(torch.float32)[:, :, None]
    whole = factored[:, :, 4:].view(torch.uint8).float() - 128
    found = (whole * factors).permute(0, 3, 1, 2)  # (panels, LANES, parts, count)
    return found.reshape(panels * LANES, parts * count)[:rows, :groups].contiguous()


def unpack(
    packed: PackedWeight, bits: int, group_size: int, in_features: int, out_features: int
) -> PackedWeight:
    """The inverse of `pack`."""
    group, groups, _ = _shape(in_features, bits, group_size)
    rows = packed.qweight.new_zeros(out_features, packed_size(in_features, bits))
    scales, zeros = (
        _products(grid, out_features, groups)
        if grid.dtype == FACTORED
        else grid.new_empty((out_features, groups) if grid.numel() else 0)
        for grid in packed[1:3]
    )
    if packed.scales.dtype == POWERS:
        scales = _numbers(packed.scales, out_features)
    _move(
        "unpack",
        (in_features, out_features, bits, group),
        (rows, scales, zeros),
        packed,
    )
    return PackedWeight(rows, scales, zeros)


def look_up(
    index: Tensor,
    packed: PackedWeight,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.packed_embedding` on tensors of `pack`, of N rows."""
    index = index.to(torch.int64).contiguous()
    y = torch.empty(len(index), in_features, dtype=dtype)
    shape = (len(index), out_features, in_features, bits, group_width(in_features, group_size))
    arguments = EmbedPacked(
        *shape,
        TYPES[dtype],
        SCALE_TYPES[packed.scales.dtype],
        pointer(index),
        pointer(packed.qweight),
        pointer(_levels_of(packed.qweight)),
        pointer(packed.scales),
        *_apart(packed.qzeros),
        pointer(y),
    )
    library.run("embed_packed", arguments, index, *packed[:3], y)
    return y


def unblock(
    blocks: Tensor,
    kind: int,
    values: int,
    group: int,
    bits: int,
    *,
    halves: bool,
    offset: bool,
    levels: Tensor,
) -> PackedWeight:
    """GGUF's blocks, uint8 (N, blocks, bytes), as rows of bits, in groups of 32 values or 16.

    Args:
        kind: GGUF's number of the type, one of `BlockKind` in kernels.h.
        values, group: of a block, and of a scale.
        bits: of a value.
        halves: scales and offsets are the blocks' float16; else they are float32.
        levels: uint8 (16,), the value of each four bits, of a type that has a table; else empty.
    """
    blocks = blocks.contiguous()
    rows, count, _ = blocks.shape
    q = blocks.new_empty(rows, count * values * bits // 8)
    dtype = torch.float16 if halves else torch.float32
    scales = blocks.new_empty(rows, count * (values // group), dtype=dtype)
    offsets = torch.empty_like(scales) if offset else q.new_empty(0)
    tensors = (blocks, levels, q, scales, offsets)
    library.run("unblock", Blocks(rows, count, kind, *map(pointer, tensors)), *tensors)
    return PackedWeight(q, scales, offsets)


def _move(
    name: str,
    shape: tuple[int, int, int, int],
    stored: tuple[Tensor, Tensor, Tensor],
    packed: PackedWeight,
) -> None:
    """Call `qllm_pack` or `qllm_unpack`.

    Args:
        name: "pack" or "unpack".
        shape: inputs, outputs, bits, inputs of a group.
    """
    rows, scales, zeros = stored
    (row_zeros, row_offsets), (own_zeros, offsets) = _apart(zeros), _apart(packed.qzeros)
    arguments = (pointer(rows), rows.shape[1], pointer(scales), row_zeros)
    compact = packed.scales.dtype in (FACTORED, POWERS)
    scale_bytes = 0 if compact else scales.element_size()
    kept = (scale_bytes, pointer(packed.qweight), pointer(packed.scales), own_zeros)
    levels = pointer(_levels_of(packed.qweight))
    packing = Packing(*shape, *arguments, *kept, row_offsets, offsets, levels)
    library.run(name, packing, *stored, *packed[:3])


def _apart(zeros: Tensor) -> tuple[int | None, int | None]:
    """Where zero points are, and where offsets."""
    offsets = zeros.dtype != torch.uint8
    return (None, pointer(zeros)) if offsets else (pointer(zeros), None)


def _weight_only_linear(
    mode: int,
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`reference.weight_only_linear` or `weight_only_linear_int8` on tensors of `pack`."""
    shape = (out_features, bits, group_size)
    return _linear(x, PackedWeight(qweight, scales, qzeros), bias, shape, mode)


weight_only_linear = partial(_weight_only_linear, WEIGHT_ONLY)
weight_only_linear_int8 = partial(_weight_only_linear, WEIGHT_ONLY_INT8)


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_features: int,
) -> Tensor:
    """`reference.int8_linear` on tensors of `pack`: 8 bits, symmetric, one group."""
    mode = INT8_DYNAMIC if input_scale is None else INT8_STATIC
    weight = PackedWeight(qweight, scales, qweight.new_empty(0))
    return _linear(x, weight, bias, (out_features, 8, -1), mode, input_scale)


def _linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    mode: int,
    input_scale: Tensor | None = None,
) -> Tensor:
    out_features, bits, group_size = shape
    rows, in_features = x.shape
    x = _in_rows(x)
    bias = bias if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(rows, out_features)
    arguments = Linear(
        rows,
        in_features,
        out_features,
        bits,
        group_width(in_features, group_size),
        mode,
        not phase.decoding(),
        pointer(x),
        TYPES[x.dtype],
        x.stride(0),
        pointer(y),
        pointer(weight.qweight),
        pointer(_levels_of(weight.qweight)),
        pointer(weight.scales),
        SCALE_TYPES[weight.scales.dtype],
        *_apart(weight.qzeros),
        pointer(bias),
        pointer(input_scale),
    )
    library.run("linear", arguments, x, y, *weight[:3], bias, input_scale)
    return y


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.dense_linear`; no row's result depends on the rows beside it.

    In a step of decode the order of a sum is another than in a prompt's pass.
    """
    x = _in_rows(x)
    y = x.new_empty(len(x), len(weight))
    tensors = (x, like(x, weight), like(x, bias), y)
    shape = (*x.shape, len(weight), x.stride(0), TYPES[x.dtype], phase.decoding())
    library.run("dense", Dense(*shape, *map(pointer, tensors)), *tensors)
    return y


def _in_rows(x: Tensor) -> Tensor:
    """x (M, K), copied if the elements of a row do not lie side by side."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
