"""Attention of a decode step, in one launch, and of prefill, in two."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import device, quantized_prefill
from qllm.ops.gpu.tiles import padded_count, power
from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.quantized_kv import QuantizedKV, padded_size

SPAN = 256  # tokens of the cache that a program takes
BLOCK = 64  # of them at once


def about(bits: int, device: torch.device) -> str:
    """What else `--explain` says of keys and values of so many bits."""
    reason = quantized_prefill.unsupported_reason(device) if bits < 16 else None
    return f"; prompts in plain torch ops: {reason}" if reason else ""


def decode_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.decode_attention`; a sequence attends to what its own position says.

    What is launched does not depend on `batch.span`, so that it can be captured in a graph.
    """
    from qllm.ops.gpu.kernels import attention

    kv.check(qkv, batch, scores)
    sequences, kv_heads, capacity, dim = len(qkv), kv.kv_heads, kv.capacity, kv.dim
    heads = qkv.shape[1] // dim - 2 * kv_heads
    group, first = heads // kv_heads, -(-dim // 2)
    padded_group, half = padded_count(group), padded_count(first)
    splits = -(-capacity // SPAN)
    if scores.window:  # which begins anywhere in a span
        splits = min(splits, (scores.window - 2) // SPAN + 2)
    y = qkv.new_empty(sequences, heads * dim)
    partials = counters = None
    if splits > 1:
        assert sequences * kv_heads <= device.MAX_TILES
        size = sequences * kv_heads * splits * padded_group * (2 * half + 2)
        partials = qkv.new_empty(size, dtype=torch.float32)
        counters = device.counters(qkv.device)
    cos, sin = (part.contiguous() for part in cos_sin) if cos_sin else (None, None)
    with device.current(qkv):
        attention.decode_attention[(sequences, kv_heads, splits)](
            qkv.contiguous(),
            cos,
            sin,
            slopes,
            *_memory(kv),
            batch.rows,
            batch.positions,
            y,
            partials,
            counters,
            heads,
            kv_heads,
            capacity,
            splits,
            scores.factor(dim),
            scores.cap,
            scores.window,
            DIM=dim,
            FIRST=first,
            HALF=half,
            GROUP=group,
            PADDED_GROUP=padded_group,
            SPAN=SPAN,
            BLOCK=BLOCK,
            SPLIT=splits > 1,
            ROTATE=cos_sin is not None,
            SLOPE=slopes is not None,
            CAP=scores.cap > 0,
            WINDOW=scores.window > 0,
            BITS=kv.bits,
            WIDTH=padded_size(dim),
            num_warps=4,
            num_stages=2,
        )
    return y


def _memory(kv: KV | QuantizedKV) -> tuple[Tensor | None, ...]:
    """What the kernel of a decode step reads and writes."""
    if isinstance(kv, QuantizedKV):
        codes = (kv.keys, kv.values, kv.key_scales, kv.value_scales, kv.key_zeros, kv.value_zeros)
        return (kv.recent_keys, kv.recent_values, *codes)
    return (kv.keys, kv.values, *[None] * 6)


def prefill_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.prefill_attention`, of all sequences at once."""
    if isinstance(kv, QuantizedKV):
        if quantized_prefill.unsupported_reason(qkv.device):
            return reference.prefill_attention(qkv, kv, batch, cos_sin, slopes, scores)
        return quantized_prefill.prefill_attention(qkv, kv, batch, cos_sin, slopes, scores)
    from qllm.ops.gpu.kernels import prefill

    kv.check(qkv, batch, scores)
    kv_heads, capacity, dim = kv.kv_heads, kv.capacity, kv.dim
    every, sequences = qkv.shape[1] // dim, len(batch.rows)
    heads, first = every - 2 * kv_heads, -(-dim // 2)
    q, y = qkv.new_empty(2, len(qkv), heads * dim)
    cos, sin = (part.contiguous() for part in cos_sin) if cos_sin else (None, None)
    width, tokens, keys_at_once, warps = prefill_tile(dim, qkv.dtype)
    index, cache = (batch.rows, batch.starts, batch.positions), (kv.keys, kv.values)
    with device.current(qkv):
        prefill.write_tokens[(batch.max_tokens, sequences)](
            qkv.contiguous(), cos, sin, *index, q, *cache, heads, kv_heads, capacity,
            DIM=dim, FIRST=first, HALF=power(first), HEADS=power(every),
            ROTATE=cos_sin is not None,
            num_warps=max(1, min(8, power(first) * power(every) // 1024)),
        )  # fmt: skip
        prefill.prefill_attention[(-(-batch.max_tokens // tokens), heads, sequences)](
            q, *cache, slopes, *index, y, heads, kv_heads, capacity,
            scores.factor(dim), scores.cap, scores.window,
            DIM=dim, WIDTH=width, GROUP=heads // kv_heads, BM=tokens, BN=keys_at_once,
            SLOPE=slopes is not None, CAP=scores.cap > 0, WINDOW=scores.window > 0,
            num_warps=warps, num_stages=2,
        )  # fmt: skip
    return batch.select(y)


def prefill_tile(dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Padded columns of a head, tokens and keys that a program takes at once, and warps."""
    width = padded_count(dim)
    if dtype == torch.float32:
        return width, 32, 32, 4
    return (width, 128, 64, 8) if width <= 128 else (width, 64, 32, 8)
