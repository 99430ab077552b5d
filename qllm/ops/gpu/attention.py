"""Attention of a decode step, in one launch, and of all prompts together, in two."""

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


def prompts_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    row_of: Tensor,
    positions: Tensor,
    starts: Tensor,
    longest: int,
    angles: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
) -> Tensor:
    """`reference.prompt_attention` of B prompts, one after the other: (N, H D).

    Args:
        qkv: (N, (H + 2 H_kv) D).
        keys, values: the cache, (B, H_kv, capacity, D), written to from the start of each row.
        row_of, positions: int64 (N,): a token's row of the cache, and its place there.
        starts: int32 (B + 1,), of the prompts among the tokens.
        longest: tokens of the longest prompt.
        angles, slopes: as there, for all N tokens.
    """
    from qllm.ops.gpu.kernels import prompts

    rows, kv_heads, capacity, dim = keys.shape
    every = qkv.shape[1] // dim
    heads, first = every - 2 * kv_heads, -(-dim // 2)
    assert keys.is_contiguous() and values.is_contiguous()
    q, y = qkv.new_empty(2, len(qkv), heads * dim)
    cos, sin = (part.contiguous() for part in angles) if angles else (None, None)
    width, tokens, keys_at_once, warps = prompt_tile(dim, qkv.dtype)
    cache = (keys, values)
    with device.current(qkv):
        prompts.place_tokens[(len(qkv),)](
            qkv.contiguous(), cos, sin, row_of, positions, q, *cache, heads, kv_heads, capacity,
            DIM=dim, FIRST=first, HALF=_power(first), HEADS=_power(every), TURN=angles is not None,
            num_warps=max(1, min(8, _power(first) * _power(every) // 1024)),
        )  # fmt: skip
        prompts.prompt_attention[(-(-longest // tokens), heads, rows)](
            q, *cache, slopes, starts, y, heads, kv_heads, capacity, 1 / math.sqrt(dim),
            DIM=dim, WIDTH=width, GROUP=heads // kv_heads, BM=tokens, BN=keys_at_once,
            SLOPE=slopes is not None, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return y


def prompt_tile(dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Columns that a head has room in, tokens and keys that a program takes at once, and warps."""
    width = _room(dim)
    if dtype == torch.float32:
        return width, 32, 32, 4
    return (width, 128, 64, 8) if width <= 128 else (width, 64, 32, 8)


def _power(count: int) -> int:
    """The power of two that is not below a count."""
    return 1 << (count - 1).bit_length()


def _room(count: int) -> int:
    """What a product on the matrix units takes for `count` rows or columns."""
    return max(SMALLEST, _power(count))
