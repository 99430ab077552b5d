"""Attention to a cache, in prefill and in decode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.quantized_kv import QuantizedKV

# Of a sequence, where gradients go through attention: keys behind the last of them take no time.
QUERIES_AT_ONCE = 64


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
        scores: their scale, cap, window and sinks.

    Returns:
        (B, H D).
    """
    q, k, v = split_heads(qkv, kv, cos_sin)
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
    q, k, v = split_heads(qkv, kv, cos_sin)
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
        for part in split_heads(qkv, kv, cos_sin)
    )
    # But for ALiBi and windows, all that is to mask is among the keys of a run of queries itself.
    plain = slopes is None and not scores.window
    position = torch.arange(min(length, QUERIES_AT_ONCE) if plain else length, device=qkv.device)
    distance = position - position[:, None]
    mask = distance.new_zeros(1, *distance.shape, dtype=torch.float32)
    if slopes is not None:
        mask = slopes.to(qkv.device)[:, None, None] * distance
    # (1 or H, T, T), or of one run of queries and its keys
    mask = mask.masked_fill_(_unseen(distance, scores), -torch.inf).to(dtype)
    # On a CPU, the gradients of torch's fused attention take three times as long as these.
    out = _Attention.apply(q, k, v, mask, scores)
    return out.transpose(1, 2).reshape(len(qkv), -1)


class _Attention(torch.autograd.Function):
    """Causal attention of queries (B, H, T, D) to keys and values (B, H_kv, T, D): (B, H, T, D).

    Autograd would fill a gradient of all keys for each run of queries, and copy what it multiplies.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores) -> Tensor:
        ctx.shape, ctx.factor, ctx.cap = q.shape, scores.factor(q.shape[-1]), scores.cap
        ctx.window = scores.window
        kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
        # The heads that share a key head become rows of one product.
        q = (q * ctx.factor).unflatten(1, (kv_heads, repeats))
        k, v = (part.reshape(-1, *part.shape[2:]) for part in (k, v))  # (B H_kv, T, D)
        mask = mask.unflatten(0, (-1, repeats)) if len(mask) > 1 else mask[None]
        sinks = None if scores.sinks is None else scores.sinks.view(kv_heads, repeats, 1, 1)
        out, saved = torch.empty_like(q, memory_format=torch.contiguous_format), []
        for run, seen in _runs(q.shape[3], ctx.window):
            queries = q[:, :, :, run].reshape(len(k), -1, k.shape[-1])
            found = queries @ k[:, seen].mT
            capped = None
            if ctx.cap:
                capped = (found.float() / ctx.cap).tanh_()
                found = capped * ctx.cap
            found = found.view(*q.shape[:3], -1, found.shape[-1])
            if mask.shape[-1] < q.shape[3]:
                own = found[..., run]
                own += mask[..., : own.shape[3], : own.shape[4]]
            else:
                found += mask[..., run, seen]
            weights = _softmax(found, sinks).to(q.dtype)
            weights = weights.view(len(k), queries.shape[1], -1)
            out[:, :, :, run] = (weights @ v[:, seen]).view(*q.shape[:3], -1, v.shape[-1])
            saved += [queries, weights, capped]
        ctx.save_for_backward(k, v, *saved)
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        k, v, *saved = ctx.saved_tensors
        batch, _, length, dim = ctx.shape
        grad_out = grad_outputs[0].unflatten(1, (len(k) // batch, -1))
        grad_q = torch.empty_like(grad_out, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for index, (run, seen) in enumerate(_runs(length, ctx.window)):
            queries, weights, capped = saved[3 * index : 3 * index + 3]
            grad_run = grad_out[:, :, :, run].reshape(queries.shape)
            grad_v[:, seen] += weights.mT @ grad_run
            grad_weights = grad_run @ v[:, seen].mT
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if capped is not None:
                grad_scores = (grad_scores * (1 - capped.square())).to(weights.dtype)
            grad_k[:, seen] += grad_scores.mT @ queries
            grad_queries = (grad_scores @ k[:, seen]).mul_(ctx.factor)
            grad_q[:, :, :, run] = grad_queries.view(*grad_q.shape[:3], -1, dim)
        shape = batch, -1, length, dim
        return grad_q.flatten(1, 2), grad_k.view(shape), grad_v.view(shape), None, None


def _runs(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """Runs of queries, and the keys that any query of a run sees."""
    for start in range(0, length, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, length)
        yield slice(start, end), slice(max(0, start + 1 - window) if window else 0, end)


def _unseen(distance: Tensor, scores: Scores) -> Tensor:
    """Which keys a query does not see, of those at such distances from it."""
    unseen = distance > 0
    return unseen | (distance <= -scores.window) if scores.window else unseen


def split_heads(
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
    """softmax(cap(q k^T · factor) + mask) v, with the factor and the cap of `scores`.

    Args:
        q: (B, H, T, D).
        keys, values: (B, H_kv, S, D); H is a multiple of H_kv, and head h of q reads head
            h // (H / H_kv).
        mask: added to the scores, broadcast to (B, H, T, S); or None.
        causal: query t sees keys up to t (needs T = S and no mask).
        scores: their scale, cap and sinks; a window is in the mask.

    Returns:
        (B, H, T, D).
    """
    batch, heads, length, dim = q.shape
    kv_heads, sinks = keys.shape[1], scores.sinks
    if heads != kv_heads and length == 1:
        # The heads that share a key head become the rows of one product: nothing is copied.
        if mask is not None and mask.shape[1] == heads:
            mask = mask.view(batch, kv_heads, heads // kv_heads, -1)
        q = q.view(batch, kv_heads, heads // kv_heads, dim)
        if sinks is not None:
            scores = scores._replace(sinks=sinks.view(kv_heads, -1, 1))
        out = _softmax_product(q, keys, values, mask, causal, scores)
        return out.view(batch, heads, 1, dim)
    if sinks is not None:
        scores = scores._replace(sinks=sinks.view(heads, 1, 1))
    if heads != kv_heads:
        keys = keys.repeat_interleave(heads // kv_heads, dim=1)
        values = values.repeat_interleave(heads // kv_heads, dim=1)
    return _softmax_product(q, keys, values, mask, causal, scores)


def _softmax_product(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scores: Scores
) -> Tensor:
    """`softmax_attention` of as many heads of queries as of keys."""
    factor = scores.factor(q.shape[-1])
    if not scores.cap and scores.sinks is None:
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, is_causal=causal, scale=factor
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    found = q.to(wide) @ keys.to(wide).mT
    if scores.cap:
        found = found.mul_(factor / scores.cap).tanh_().mul_(scores.cap)
    else:
        found = found.mul_(factor)
    if causal:
        found += torch.full(found.shape[-2:], -torch.inf, device=q.device).triu_(1)
    if mask is not None:
        found = found + mask
    return (_softmax(found, scores.sinks) @ values.to(wide)).to(q.dtype)


def _softmax(found: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of scores (…, S), which a head's sink joins, broadcast to (…, 1)."""
    if sinks is None:
        return found.softmax(-1)
    joined = sinks.to(device=found.device, dtype=found.dtype).expand(*found.shape[:-1], 1)
    return torch.cat((found, joined), dim=-1).softmax(-1)[..., :-1]
