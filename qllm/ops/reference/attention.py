"""Attention to a cache, in prefill and in decode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.quantized_kv import QuantizedKV

# Of a sequence, where gradients go through attention: keys behind the last of them take no time.
QUERIES_AT_ONCE = 128


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the heads of x (N, H, D) by cosines and sines (N, D): pairs are (i, i + D / 2)."""
    cos, sin = (part[:, None] for part in cos_sin)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def decode_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention of one new token per sequence to the cache, which its own key and value join.

    Args:
        qkv: (B, (H + 2 H_kv) D): the heads of the queries, then of the key, then of the value.
        kv: the cache of this layer, written to at the tokens' rows and positions.
        batch: B sequences of one token each.
        cos_sin: cosines and sines (B, D) by which queries and keys are rotated; None: not at all.
        slopes: float32 (H,), by which scores fall with the distance (ALiBi); None: they do not.
        scores: their scale, cap and window.

    Returns:
        (B, H D).
    """
    q, k, v = _heads(qkv, kv, cos_sin)
    kv.write(batch.rows, batch.positions, k, v)
    keys, values = kv.read(batch.rows, batch.positions + 1)
    distance = torch.arange(batch.span, device=qkv.device) - batch.positions[:, None, None]
    added = distance.new_zeros(distance.shape, dtype=torch.float32)  # (B, 1, S)
    if slopes is not None:
        added = slopes.to(qkv.device)[:, None] * distance  # (B, H, S)
    mask = added.masked_fill(_unseen(distance, scores), -torch.inf).to(qkv.dtype)[:, :, None]
    out = softmax_attention(q[:, :, None], keys, values, mask, causal=False, scores=scores)
    return out.reshape(len(qkv), -1)


def prefill_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention of runs of tokens to those before them in the cache, which they join, and to
    themselves.

    Arguments are those of `decode_attention`, for the N tokens of all sequences.

    Returns:
        (N, H D), or (B, H D) where the batch asks for the last tokens alone.
    """
    q, k, v = _heads(qkv, kv, cos_sin)
    outputs = []
    for row, start, end in zip(
        batch.rows.split(1), batch.starts[:-1], batch.starts[1:], strict=True
    ):
        past = int(batch.positions[start])
        for piece in kv.pieces(past, past + int(end - start)):
            run = slice(int(start) + piece.start - past, int(start) + piece.stop - past)
            positions = batch.positions[run]
            kv.write(row.expand(len(piece)), positions, k[run], v[run])
            keys, values = kv.read(row, positions[-1:] + 1)
            mask = None
            if slopes is not None or piece.start or 0 < scores.window < piece.stop:
                distance = torch.arange(piece.stop, device=qkv.device) - positions[:, None]
                mask = distance.new_zeros(1, *distance.shape, dtype=torch.float32)
                if slopes is not None:
                    mask = slopes.to(qkv.device)[:, None, None] * distance
                mask = mask.masked_fill_(_unseen(distance, scores), -torch.inf).to(qkv.dtype)[None]
            queries = q[run].transpose(0, 1)[None]
            out = softmax_attention(queries, keys, values, mask, causal=mask is None, scores=scores)
            outputs.append(out[0].transpose(0, 1).flatten(1))
    return batch.select(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


def differentiable_attention(
    qkv: Tensor,
    kv: KV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`prefill_attention` of B whole sequences of one length T, all at once: (B T, H D).

    Gradients go through it: nothing is written to the cache.
    """
    length, dtype = batch.span, qkv.dtype
    q, k, v = (
        part.to(dtype).unflatten(0, (-1, length)).transpose(1, 2)  # (B, H, T, D)
        for part in _heads(qkv, kv, cos_sin)
    )
    place = torch.arange(length, device=qkv.device)
    distance = place - place[:, None]
    mask = distance.new_zeros(1, length, length, dtype=torch.float32)
    if slopes is not None:
        mask = slopes.to(qkv.device)[:, None, None] * distance
    mask = mask.masked_fill_(_unseen(distance, scores), -torch.inf).to(dtype)  # (1 or H, T, T)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    k, q = k.mT, q * scores.factor(q.shape[-1])
    outputs = []
    # On a CPU, the gradients of torch's fused attention take three times as long as these.
    for start in range(0, length, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, length)
        seen = slice(max(0, start + 1 - scores.window) if scores.window else 0, end)
        found = q[:, :, start:end] @ k[..., seen]
        if scores.cap:
            found = (found.float() / scores.cap).tanh() * scores.cap
        found = (found + mask[:, start:end, seen]).softmax(-1).to(dtype)
        outputs.append(found @ v[:, :, seen])
    return torch.cat(outputs, 2).transpose(1, 2).reshape(len(qkv), -1)


def _unseen(distance: Tensor, scores: Scores) -> Tensor:
    """Which keys a query does not see, of those at such distances from it."""
    unseen = distance > 0
    return unseen | (distance <= -scores.window) if scores.window else unseen


def _heads(
    qkv: Tensor, kv: KV | QuantizedKV, cos_sin: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (N, H, D), keys and values (N, H_kv, D), the former two rotated."""
    heads = qkv.shape[1] // kv.dim - 2 * kv.kv_heads
    q, k, v = qkv.view(len(qkv), -1, kv.dim).split([heads, kv.kv_heads, kv.kv_heads], dim=1)
    return (q, k, v) if cos_sin is None else (rotate(q, cos_sin), rotate(k, cos_sin), v)


def softmax_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    causal: bool,
    scores: Scores = PLAIN,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v.

    Args:
        q: (B, H, T, D).
        keys, values: (B, H_kv, S, D); H is a multiple of H_kv, and head h of q reads head
            h // (H / H_kv).
        mask: added to the scores, broadcast to (B, H, T, S); or None.
        causal: query t sees keys up to t (needs T = S and no mask).
        scores: their scale and cap; a window is in the mask.

    Returns:
        (B, H, T, D).
    """
    batch, heads, length, dim = q.shape
    kv_heads = keys.shape[1]
    if heads != kv_heads and length == 1:
        # The heads that share a key head become the rows of one product: nothing is copied.
        if mask is not None and mask.shape[1] == heads:
            mask = mask.view(batch, kv_heads, heads // kv_heads, -1)
        q = q.view(batch, kv_heads, heads // kv_heads, dim)
        out = _softmax_product(q, keys, values, mask, causal, scores)
        return out.view(batch, heads, 1, dim)
    if heads != kv_heads:
        keys = keys.repeat_interleave(heads // kv_heads, dim=1)
        values = values.repeat_interleave(heads // kv_heads, dim=1)
    return _softmax_product(q, keys, values, mask, causal, scores)


def _softmax_product(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scores: Scores
) -> Tensor:
    """`softmax_attention` of as many heads of queries as of keys."""
    factor = scores.factor(q.shape[-1])
    if not scores.cap:
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=causal, scale=factor
        )
    found = (q.float() @ keys.float().mT).mul_(factor / scores.cap).tanh_().mul_(scores.cap)
    if causal:
        found += torch.full(found.shape[-2:], -torch.inf, device=q.device).triu_(1)
    if mask is not None:
        found = found + mask
    return (found.softmax(-1) @ values.float()).to(q.dtype)
