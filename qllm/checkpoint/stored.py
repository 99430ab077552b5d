"""A quantized linear of a checkpoint: which tensors it has, and its parts put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qllm.checkpoint.formats import (
    WORD,
    Int8Weight,
    from_awq,
    from_gptq,
    from_int_quantized,
    from_int_quantized_weight,
    from_pack_quantized,
)
from qllm.checkpoint.quant_config import Storage
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight

Quantized = PackedWeight | Int8Weight

# Of each format, the tensors that a module has, and those that it may have.
TENSORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gptq": (("qweight", "qzeros", "scales"), ("g_idx",)),
    "awq": (("qweight", "qzeros", "scales"), ()),
    "pack-quantized": (
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx"),
    ),
    "int-quantized": (
        ("weight", "weight_scale"),
        ("weight_zero_point", "input_scale", "input_zero_point"),
    ),
}


# Of each format, the tensors in which a module's output channels lie side by side: along which
# dimension, and whether several share a word there.
CHANNELS: dict[str, dict[str, tuple[int, bool]]] = {
    "gptq": {"qweight": (1, False), "qzeros": (1, True), "scales": (1, False)},
    "awq": {"qweight": (1, True), "qzeros": (1, True), "scales": (1, False)},
    "pack-quantized": {
        "weight_packed": (0, False),
        "weight_scale": (0, False),
        "weight_zero_point": (0, True),
    },
    "int-quantized": {
        "weight": (0, False),
        "weight_scale": (0, False),
        "weight_zero_point": (0, False),
    },
}


def slices_of(
    storage: Storage, shapes: Mapping[str, Sequence[int]], out_features: int, run: range
) -> dict[str, tuple[int, range]] | None:
    """What to read of a module's tensors for some of its output channels.

    Args:
        shapes: of the tensors that are there.
        run: ends of it lie between words, at a multiple of WORD or behind the last channel.

    Returns:
        dimension and run of each tensor that has channels; None where one is not as long as the
        channels are many, so that none can be cut.
    """
    found = {}
    for key, (dim, packed) in CHANNELS[storage.format].items():
        if key not in shapes:
            continue
        bits = storage.spec.bits if packed else WORD
        if len(shapes[key]) != 2 or shapes[key][dim] != -(-out_features * bits // WORD):
            return None
        found[key] = dim, range(run.start * bits // WORD, -(-run.stop * bits // WORD))
    return found


def read_linear(
    storage: Storage, tensors: Mapping[str, Tensor], in_features: int, out_features: int
) -> Quantized:
    """One module's tensors as a matrix.

    Raises:
        UserError: for tensors that are not what `storage` says; it begins with a tensor's name.
    """
    spec, shape = storage.spec, (in_features, out_features)
    if storage.format == "gptq":
        return from_gptq(tensors, spec.bits, spec.group_size, *shape, v1=storage.v1)
    if storage.format == "awq":
        return from_awq(tensors, spec.group_size, *shape)
    if storage.format == "pack-quantized":
        return from_pack_quantized(tensors, spec.bits, spec.group_size, *shape)
    if spec.kind == "weight_only":
        return from_int_quantized_weight(tensors, spec.bits, spec.group_size, *shape)
    return from_int_quantized(tensors, *shape, static=spec.kind == "w8a8_static")


def join_rows(parts: Sequence[Quantized], bits: int) -> Quantized:
    """The matrix whose rows are those of `parts`, one after the other; its scales are computable.

    Static activation scales of the parts may differ: the largest holds all of them, as in vLLM.

    Raises:
        UserError: for parts whose input channels lie in different orders.
    """
    scales = torch.cat([part.scales for part in parts])
    if scales.dtype == torch.bfloat16:
        scales = scales.float()
    qweight = torch.cat([part.qweight for part in parts])
    first = parts[0]
    if isinstance(first, Int8Weight):
        inputs = [part.input_scale for part in parts if part.input_scale is not None]
        return Int8Weight(qweight, scales, torch.stack(inputs).amax() if inputs else None)
    for part in parts[1:]:
        orders = [p.order for p in (first, part) if p.order is not None]
        if len(orders) == 1 or (orders and not torch.equal(*orders)):
            raise UserError("their g_idx differ, and they are one matrix here")
    zeros = [part.qzeros for part in parts]
    if any(zero.numel() for zero in zeros):  # a symmetric part among others has its zeros, too
        middle = 2 ** (bits - 1)
        zeros = [
            zero if zero.numel() else torch.full_like(part.scales, middle, dtype=torch.uint8)
            for zero, part in zip(zeros, parts, strict=True)
        ]
    return PackedWeight(qweight, scales, torch.cat(zeros), first.order)


def take_rows(weight: Quantized, rows: Tensor | slice) -> Quantized:
    """Some rows of a matrix, in a new order."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.qweight[rows], weight.scales[rows], weight.input_scale)
    zeros = weight.qzeros[rows] if weight.qzeros.numel() else weight.qzeros
    return PackedWeight(weight.qweight[rows], weight.scales[rows], zeros, weight.order)
