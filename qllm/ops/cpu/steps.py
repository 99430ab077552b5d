"""What lies between the linear layers of a decoder; see `reference` for what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.ops.cpu import library
from qllm.ops.cpu.interface import (
    Activate,
    Add,
    Attend,
    Embed,
    Gather,
    Join,
    Norm,
    Route,
    ScaleRows,
)
from qllm.ops.cpu.library import TYPES, like, pointer
from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.quantized_kv import QuantizedKV, padded_size
from qllm.ops.reference import SWIGLU_OAI

# As in kernels.h; the last one is of two inputs.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")
GATED_ACTIVATIONS = (*ACTIVATIONS, SWIGLU_OAI)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """`reference.gather`; that the index is within x is not checked."""
    x, index = x.contiguous(), index.to(torch.int64).contiguous()
    y = x.new_empty(len(x), len(index))
    tensors = (x, index, y)
    arguments = Gather(*x.shape, len(index), x.element_size(), *map(pointer, tensors))
    library.run("gather", arguments, *tensors)
    return y


def join(x: Tensor, z: Tensor, columns: int) -> Tensor:
    """`reference.join`."""
    x, z = x.contiguous(), z.contiguous()
    y = x.new_empty(len(x), x.shape[1] + columns)
    arguments = Join(*x.shape, z.shape[1], columns, x.element_size(), *map(pointer, (x, z, y)))
    library.run("join", arguments, x, z, y)
    return y


def embedding(index: Tensor, table: Tensor, offset: int) -> Tensor:
    """`reference.embedding`."""
    index, table = index.to(torch.int64).contiguous(), table.contiguous()
    y = table.new_empty(len(index), table.shape[1])
    shape = (len(index), len(table), table.shape[1] * table.element_size(), offset)
    tensors = (index, table, y)
    library.run("embed", Embed(*shape, *map(pointer, tensors)), *tensors)
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.layer_norm`."""
    return _norm(x, weight, bias, eps, centered=True)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`reference.rms_norm`."""
    return _norm(x, weight, None, eps, offset, centered=False)


def qk_norm(
    qkv: Tensor,
    weight: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    offset: float = 0.0,
    values: bool = False,
) -> Tensor:
    """`reference.qk_norm`."""
    every = heads + 2 * kv_heads
    rows = qkv.contiguous().view(len(qkv) * every, -1)
    runs = (every, heads, kv_heads, kv_heads if values else 0)
    return _norm(rows, weight, None, eps, offset, centered=False, runs=runs).view(qkv.shape)


def wide_qk_norm(
    qkv: Tensor, weight: Tensor, queries: int, keys: int, eps: float, offset: float = 0.0
) -> Tensor:
    """`reference.wide_qk_norm`."""
    qkv, weight = qkv.contiguous(), weight.to(qkv.dtype).contiguous()
    y, width = torch.empty_like(qkv), qkv.shape[1]
    values = width - queries - keys
    as_it_is = (1, 0, 0, 0)  # runs of one row, which stays
    first = 0
    for columns, runs in ((queries, (0,) * 4), (keys, (0,) * 4), (values, as_it_is)):
        of_part = slice(first, first + columns)
        parts = (qkv[:, of_part], None if first >= len(weight) else weight[of_part], None)
        tensors = (*parts, y[:, of_part])
        shape = (len(qkv), columns, width, False, TYPES[qkv.dtype], eps, offset, *runs)
        library.run("norm", Norm(*shape, *map(pointer, tensors)), *tensors)
        first += columns
    return y


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    *,
    centered: bool,
    runs: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    tensors = (x, like(x, weight), like(x, bias), y)
    shape = (*x.shape, x.shape[1], centered, TYPES[x.dtype], eps, offset, *runs)
    library.run("norm", Norm(*shape, *map(pointer, tensors)), *tensors)
    return y


def activation(x: Tensor, name: str) -> Tensor:
    """`reference.activation`."""
    return _activate(x, ACTIVATIONS.index(name), gated=False)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """`reference.gated_activation`."""
    return _activate(x, GATED_ACTIVATIONS.index(name), gated=True)


def _activate(x: Tensor, kind: int, *, gated: bool) -> Tensor:
    x = x.contiguous()
    rows, channels = x.shape[0], x.shape[1] // (2 if gated else 1)
    y = x.new_empty(rows, channels)
    arguments = Activate(rows, channels, kind, gated, TYPES[x.dtype], pointer(x), pointer(y))
    library.run("activate", arguments, x, y)
    return y


def add(x: Tensor, z: Tensor) -> Tensor:
    """`reference.add`."""
    return _add(x.contiguous(), like(x, z), 1.0)


def scale(x: Tensor, factor: float) -> Tensor:
    """`reference.scale`."""
    return _add(x.contiguous(), None, factor)


def scale_rows(x: Tensor, factors: Tensor, columns: int) -> Tensor:
    """`reference.scale_rows`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    tensors = (x, like(x, factors), y)
    arguments = ScaleRows(*x.shape, columns, TYPES[x.dtype], *map(pointer, tensors))
    library.run("scale_rows", arguments, *tensors)
    return y


def route(
    logits: Tensor, gate: Tensor | None, top_k: int, *, normalizes: bool
) -> tuple[Tensor, Tensor]:
    """`reference.route`."""
    logits, gate = logits.contiguous(), like(logits, gate)
    rows, experts = logits.shape
    columns = top_k + (gate is not None)
    weights = torch.empty(rows, columns)
    chosen = torch.empty(rows, columns, dtype=torch.int64)
    tensors = (logits, gate, weights, chosen)
    arguments = Route(rows, experts, top_k, normalizes, TYPES[logits.dtype], *map(pointer, tensors))
    library.run("route", arguments, *tensors)
    return weights, chosen


def _add(x: Tensor, z: Tensor | None, factor: float) -> Tensor:
    y = torch.empty_like(x)
    tensors = (x, z, y)
    arguments = Add(x.numel(), TYPES[x.dtype], factor, *map(pointer, tensors))
    library.run("add", arguments, *tensors)
    return y


def decode_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.decode_attention`; a sequence attends to what its own position says."""
    return _attend("attend", qkv, kv, batch, cos_sin, slopes, scores)


def prefill_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.prefill_attention`; where a run of tokens begins and ends changes no bit."""
    return _attend("attend_prefill", qkv, kv, batch, cos_sin, slopes, scores)


def _attend(
    function: str,
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    kv.check(qkv, batch, scores)
    heads = qkv.shape[1] // kv.dim - 2 * kv.kv_heads
    y = qkv.new_empty(len(batch.rows) if batch.last else len(qkv), heads * kv.dim)
    index = (batch.rows, batch.starts, batch.positions)
    rotation = [like(qkv, part) for part in cos_sin or (None, None)]
    tensors = (qkv.contiguous(), *index, *rotation, slopes, scores.sinks)
    if isinstance(kv, QuantizedKV):
        tensors += (kv.recent_keys, kv.recent_values, y, kv.keys, kv.values, kv.key_scales)
        tensors += (kv.value_scales, kv.key_zeros, kv.value_zeros)
    else:
        tensors += (kv.keys, kv.values, y, *[None] * 6)
    shape = (len(batch.rows), heads, kv.kv_heads, kv.dim, kv.capacity, TYPES[qkv.dtype])
    how = (kv.bits, padded_size(kv.dim), scores.window, scores.factor(kv.dim), scores.cap)
    arguments = Attend(*shape, *how, batch.last, *map(pointer, tensors))
    library.run(function, arguments, *tensors)
    return y
