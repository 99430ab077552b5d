"""Dense packing of b-bit integers: 32 values in b 32-bit words, for b from 1 to 8.

Each row is one little-endian bit stream: value i takes bits [i·b, (i+1)·b). That is the packing
of GPTQ checkpoints, in which the stream runs down a column of `qweight`; for 3 bits it gives
GPTQ's 10 values + 2 bits, 1 bit + 10 values + 1 bit, 2 bits + 10 values. Rows are padded with
zeros to a multiple of 32 values, so that they end on a word.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

VALUES_PER_BLOCK = 32
BITS = range(1, 9)


class PackedWeight(NamedTuple):
    """A matrix (N, K) as b-bit integers in groups of g input channels, G = ceil(K / g) to a row.

    Attributes:
        qweight: uint8 (N, packed_size(K, b)).
        scales: float16, or float32 where float16 over- or underflows, (N, G).
        qzeros: uint8 (N, G); empty for a symmetric grid, where each is 2^(b-1); or, in the type of
            the scales, offsets: a value is then q · scale + offset (GGUF's Q4_1, MLX, HQQ).
        perm: int64 (K,), where the groups are not runs of input channels: packed column i holds
            input channel perm[i], and the groups are runs of packed columns. None is 0, 1, 2, ….
    """

    qweight: Tensor
    scales: Tensor
    qzeros: Tensor
    perm: Tensor | None = None


def group_width(columns: int, group_size: int) -> int:
    """Input channels in a full group of a row of `columns`; a group size of -1 is all of them."""
    return columns if group_size == -1 else min(group_size, columns)


def scheme_of(qzeros: Tensor) -> str:
    """The `QuantSpec.scheme` of a matrix with these zero points."""
    if not qzeros.numel():
        return "sym"
    return "offset" if qzeros.is_floating_point() else "asym"


def packed_size(count: int, bits: int) -> int:
    """Bytes that a row of `count` values takes at `bits` bits."""
    return -(-count // VALUES_PER_BLOCK) * VALUES_PER_BLOCK * bits // 8


def _period(bits: int) -> tuple[int, int]:
    """After how many values, and bytes, the position of a value inside its byte repeats."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack rows of integers.

    Args:
        values: uint8 (R, C), each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 (R, packed_size(C, bits)).

    Raises:
        ValueError: for bits, a dtype or values out of range.
    """
    _check(values, bits)
    if values.numel() and int(values.max()) >> bits:
        raise ValueError(f"value {int(values.max())} does not fit in {bits} bits")
    rows, count = values.shape
    if count % VALUES_PER_BLOCK:
        values = pad(values, (0, -count % VALUES_PER_BLOCK))
    if bits == 8:
        return values.contiguous()
    period, size = _period(bits)
    values = values.unflatten(1, (-1, period))
    packed = values.new_zeros(rows, values.shape[1], size)
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= values[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= values[..., i] >> (8 - shift)
    return packed.flatten(1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 (R, packed_size(count, bits)) to uint8 (R, count)."""
    _check(packed, bits)
    rows, stored = packed.shape
    if stored != packed_size(count, bits):
        raise ValueError(
            f"{stored} bytes do not hold {count} values of {bits} bits; "
            f"that takes {packed_size(count, bits)}"
        )
    if bits == 8:
        return packed[:, :count]
    period, size = _period(bits)
    packed = packed.unflatten(1, (-1, size))
    values = packed.new_empty(rows, packed.shape[1], period)
    mask = (1 << bits) - 1
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        value = packed[..., byte] >> shift
        if shift + bits > 8:
            value |= packed[..., byte + 1] << (8 - shift)
        torch.bitwise_and(value, mask, out=values[..., i])
    return values.flatten(1)[:, :count]


def _check(tensor: Tensor, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"cannot pack {bits} bits; choose 1 to 8")
    if tensor.dtype != torch.uint8 or tensor.dim() != 2:
        raise ValueError(
            f"packing takes a uint8 matrix, not {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
