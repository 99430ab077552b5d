"""Every op in plain torch: the specification that kernels are held to. Tensors only."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.quantized_kv import QuantizedKV
from qllm.quant.packing import group_width, unpack

# |q| <= 128, so 1024 products sum to at most 2^24: every partial sum is an exact float32.
EXACT_FLOAT32_TERMS = 1024

# Of `weight_only_linear_int8`: inputs that share a scale, as in llama.cpp's and OpenVINO's way of
# doing it; and the size from which a row stays as it is (so do infinities and NaN).
INT8_BLOCK = 128
HUGE = 2.0**100

# Weights are dequantized in pieces of about this many: the temporaries stay in cache, and a
# dense copy of a layer never exists.
CHUNK_WEIGHTS = 1 << 21


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) @ weight (N, K)^T + bias (N,), in the type of x."""
    return F.linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`dense_linear` by oneDNN in float32 as well, where torch takes MKL."""
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The matrix that packed integers stand for: (q - zero) * scale, rounded to dtype once.

    With offsets in place of zero points it is q * scale + offset, in float32.

    Args:
        qweight: uint8 (N, packed_size(K, bits)), as `qllm.quant.packing` packs.
        scales: float16 or float32 (N, G).
        qzeros: uint8 (N, G), or empty for a symmetric grid with zero 2^(bits-1), or offsets, in
            the type of the scales.

    Returns:
        (N, K) in dtype.
    """
    q = unpack(qweight, bits, in_features)
    if qzeros.is_floating_point():
        group = in_features if group_size == -1 else min(group_size, in_features)
        weight = q.float().mul_(_per_column(scales.float(), group, in_features))
        return weight.add_(_per_column(qzeros.float(), group, in_features)).to(dtype)
    # In float16 the product of a float16 scale and an integer is rounded once, as it would be
    # from float32; bfloat16 would round the scale first.
    work = dtype if dtype == scales.dtype == torch.float16 else torch.float32
    zeros = qzeros[..., None] if qzeros.numel() else 2 ** (bits - 1)
    group = group_width(in_features, group_size)
    if in_features % group:
        zeros = _per_column(qzeros, group, in_features) if qzeros.numel() else zeros
        weight = q.to(work).sub_(zeros).mul_(_per_column(scales, group, in_features))
    else:
        weight = q.to(work).unflatten(1, (-1, group)).sub_(zeros).mul_(scales[..., None])
    return weight.reshape(q.shape).to(dtype)


def _per_column(values: Tensor, group: int, columns: int) -> Tensor:
    return values.repeat_interleave(group, dim=1)[:, :columns]


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
    """x (M, K) times the matrix that the packed integers stand for, in the type of x: (M, N)."""
    out = x.new_empty(x.shape[0], out_features)
    rows = max(1, CHUNK_WEIGHTS // x.shape[1])
    for start in range(0, len(qweight), rows):
        part = slice(start, start + rows)
        zeros = qzeros[part] if qzeros.numel() else qzeros
        weight = dequantize(
            qweight[part], scales[part], zeros, bits, group_size, x.shape[1], x.dtype
        )
        out[:, part] = F.linear(x, weight, None if bias is None else bias[part])
    return out


def weight_only_linear_int8(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`weight_only_linear` of x rounded to int8 (see `round_blocks`), multiplied in float32."""
    packed = (qweight, scales, qzeros)
    bias = None if bias is None else bias.float()
    rounded = round_blocks(x, group_size)
    return weight_only_linear(rounded, *packed, bias, out_features, bits, group_size).to(x.dtype)


def round_blocks(x: Tensor, group_size: int) -> Tensor:
    """x (M, K) as int8 would hold it, in float32.

    Each run of up to INT8_BLOCK inputs of a group has a scale, its largest value / 127. A row with
    values from HUGE on, infinities or NaN is left as it is.
    """
    values = x.float()
    rounded = torch.empty_like(values)
    columns = x.shape[1]
    group = group_width(columns, group_size)
    for first in range(0, columns, group):
        end = min(first + group, columns)
        for start in range(first, end, INT8_BLOCK):
            part = slice(start, min(start + INT8_BLOCK, end))
            steps = values[:, part].abs().amax(dim=1, keepdim=True) / 127
            steps = torch.where(steps == 0, 1.0, steps)
            rounded[:, part] = (values[:, part] / steps).round_().clamp_(-127, 127) * steps
    kept = ~(values.abs() < HUGE).all(dim=1, keepdim=True)
    return torch.where(kept, values, rounded)


class Int8Rows(NamedTuple):
    """Activations (M, K) as integers: `values` int8, times `scales` float32 (M, 1) or ().

    Attributes:
        dtype: that they had, and that a product of them gets.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


def int8_linear(
    x: Tensor | Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_features: int,
) -> Tensor:
    """x (M, K) as int8 times int8 weights (N, K), summed exactly, in the type of x: (M, N).

    Args:
        x: numbers, or what `quantize_rows` makes of them.
        scales: (N,), of the weights.
        input_scale: float32 (), of x; None: one per row, from its largest value.
    """
    return _int8_linear(int8_matmul, x, qweight, scales, bias, input_scale)


def int8_linear_by_int_mm(
    x: Tensor | Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_features: int,
) -> Tensor:
    """`int8_linear` with `int_mm` for the product."""
    return _int8_linear(int_mm, x, qweight, scales, bias, input_scale)


def _int8_linear(
    product: Callable[[Tensor, Tensor], Tensor],
    x: Tensor | Int8Rows,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
) -> Tensor:
    rows = x if isinstance(x, Int8Rows) else quantize_rows(x, input_scale)
    return scale_int32(product(rows.values, qweight), rows.scales, scales, bias, rows.dtype)


def quantize_rows(x: Tensor, input_scale: Tensor | None) -> Int8Rows:
    """x (M, K) as int8, by a scale that is given, or one per row."""
    if input_scale is None:
        return Int8Rows(*quantize_per_token(x), x.dtype)
    return Int8Rows(quantize_int8(x, input_scale), input_scale, x.dtype)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale per row: x (M, K) to int8 (M, K) and float32 (M, 1)."""
    scales = x.abs().amax(dim=-1, keepdim=True).float() * 2 / 255
    scales = torch.where(scales == 0, 1.0, scales)
    return quantize_int8(x, scales), scales


def quantize_int8(x: Tensor, scales: Tensor) -> Tensor:
    """clamp(round(x / scale), -128, 127) as int8; `scales` float32, broadcast against x."""
    return torch.round(x.float() / scales).clamp_(-128, 127).to(torch.int8)


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 (M, K) @ weight int8 (N, K)^T, exactly: int32 (M, N)."""
    total = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.int32)
    for a, b in zip(
        x.split(EXACT_FLOAT32_TERMS, 1), weight.split(EXACT_FLOAT32_TERMS, 1), strict=True
    ):
        total += (a.float() @ b.float().t()).to(torch.int32)
    return total


def int_mm(x: Tensor, weight: Tensor) -> Tensor:
    """`int8_matmul` by torch's own int8 kernel; K is 2 or more."""
    # It misreads a single row whose stride is not K (pytorch#195066); `view` sets the stride.
    return torch._int_mm(x.reshape(-1).view(x.shape), weight.t())


def scale_int32(
    total: Tensor, x_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int32 sums (M, N) back to numbers: total * x_scales (M, 1) or () * scales (N,) + bias."""
    y = total.float().mul_(x_scales).mul_(scales.float())
    if bias is not None:
        y = y.add_(bias)
    return y.to(dtype)


def embedding(index: Tensor, table: Tensor, offset: int) -> Tensor:
    """Rows `index + offset` of a table (V, C): (N, C)."""
    return F.embedding(index + offset, table)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Each row of x (N, C) to mean 0 and variance 1, times weight (C,), plus bias (C,)."""
    return F.layer_norm(x, x.shape[1:], weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Each row of x (N, C) to a root mean square of 1, times weight (C,) + offset."""
    if offset and weight is not None:
        # In float32: a half type would round the sum.
        weight = weight.float() + offset
        return F.rms_norm(x.float(), x.shape[1:], weight, eps).to(x.dtype)
    return F.rms_norm(x, x.shape[1:], weight, eps)


def qk_norm(
    qkv: Tensor, weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float = 0.0
) -> Tensor:
    """`rms_norm` of each head of the queries and of the keys, the values left as they are.

    Args:
        qkv: (N, (H + 2 H_kv) D): the heads of the queries, then of the key, then of the value.
        weight: (2 D,), of the queries, then of the keys.

    Returns:
        as qkv.
    """
    parts = qkv.view(len(qkv), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
    normed = [
        rms_norm(part.flatten(0, 1), each, eps, offset).view(part.shape)
        for part, each in zip(parts, weight.chunk(2), strict=False)
    ]
    return torch.cat([*normed, parts[2]], dim=1).view(qkv.shape)


def layer_norm_int8(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, input_scale: Tensor | None
) -> Int8Rows:
    """`layer_norm`, then `quantize_rows`."""
    return quantize_rows(layer_norm(x, weight, bias, eps), input_scale)


def rms_norm_int8(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    input_scale: Tensor | None,
    offset: float = 0.0,
) -> Int8Rows:
    """`rms_norm`, then `quantize_rows`."""
    return quantize_rows(rms_norm(x, weight, eps, offset), input_scale)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activation(x: Tensor, name: str) -> Tensor:
    """One of ACTIVATIONS of x (N, C)."""
    return ACTIVATIONS[name](x)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """f(gate) * up for x (N, 2 C), which is [gate; up]: (N, C)."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[name](gate) * up


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Columns `index` (J,), int64, of x (N, C): (N, J)."""
    return x[:, index]


def add(x: Tensor, z: Tensor) -> Tensor:
    """x + z, of one shape."""
    return x + z


def scale(x: Tensor, factor: float) -> Tensor:
    """x times a number."""
    return x * factor


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
    out = attention(q[:, :, None], keys, values, mask, causal=False, scores=scores)
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
            out = attention(queries, keys, values, mask, causal=mask is None, scores=scores)
            outputs.append(out[0].transpose(0, 1).flatten(1))
    return batch.kept(outputs[0] if len(outputs) == 1 else torch.cat(outputs))


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
    # On a CPU, the gradients of torch's fused attention take three times as long as these.
    found = (q * scores.factor(q.shape[-1])) @ k.mT
    if scores.cap:
        found = (found.float() / scores.cap).tanh() * scores.cap
    out = (found + mask).softmax(-1).to(dtype) @ v
    return out.transpose(1, 2).reshape(len(qkv), -1)


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


def attention(
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
    """`attention` of as many heads of queries as of keys."""
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
