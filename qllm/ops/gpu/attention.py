"""Attention of a decode step, in one launch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qllm.ops.gpu import device

SPAN = 256  # tokens of the cache that a program takes
BLOCK = 64  # of them at once
SMALLEST = 16  # rows or columns of a product on the matrix units


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    span: int,
    angles: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
) -> Tensor:
    """`reference.decode_attention`; rows attend to what their own positions say.

    What is launched does not depend on `span`, so that it can be captured in a graph.
    """
    from qllm.ops.gpu.kernels import attention

    rows, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    if span > capacity:
        raise IndexError(f"{span} tokens in a cache for {capacity}")
    assert keys.is_contiguous() and values.is_contiguous()
    group, first = heads // kv_heads, -(-dim // 2)
    room, half = _room(group), _room(first)
    splits = -(-capacity // SPAN)
    y = qkv.new_empty(rows, heads * dim)
    partials = counters = None
    if splits > 1:
        assert rows * kv_heads <= device.MOST_TILES
        size = rows * kv_heads * splits * room * (2 * half + 2)
        partials = qkv.new_empty(size, dtype=torch.float32)
        counters = device.counters(qkv.device)
    cos, sin = (part.contiguous() for part in angles) if angles else (None, None)
    with device.current(qkv):
        attention.decode_attention[(rows, kv_heads, splits)](
            qkv.contiguous(),
            cos,
            sin,
            slopes,
            keys,
            values,
            positions,
            y,
            partials,
            counters,
            heads,
            kv_heads,
            capacity,
            1 / math.sqrt(dim),
            DIM=dim,
            FIRST=first,
            HALF=half,
            GROUP=group,
            GROUP_ROOM=room,
            SPAN=SPAN,
            BLOCK=BLOCK,
            SPLITS=splits,
            TURN=angles is not None,
            SLOPE=slopes is not None,
            num_warps=4,
            num_stages=2,
        )
    return y


def _room(count: int) -> int:
    """What a product on the matrix units takes for `count` rows or columns."""
    return max(SMALLEST, 1 << (count - 1).bit_length())
