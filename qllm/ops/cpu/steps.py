"""What lies between the linear layers of a decoder; see `reference` for what each computes."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.ops.cpu import library
from qllm.ops.cpu.library import TYPES, like, pointer, structure

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")  # as in kernels.h

# As in kernels.h; eps, offset and factor are doubles.
Activate = structure("Activate", "rows channels kind gated type *x *y")
Norm = structure(
    "Norm",
    "rows channels centered type =eps =offset run first second *x *weight *bias *y",
)
Add = structure("Add", "count type =factor *x *z *y")
Embed = structure("Embed", "rows table_rows bytes offset *index *table *y")
Attend = structure(
    "Attend",
    "rows heads kv_heads dim capacity type *qkv *positions *cos *sin *slopes *keys *values *y",
)
AttendPrompt = structure(
    "AttendPrompt",
    "length heads kv_heads dim capacity type *qkv *cos *sin *slopes *keys *values *y",
)


def embedding(index: Tensor, table: Tensor, offset: int) -> Tensor:
    """`reference.embedding`."""
    index, table = index.to(torch.int64).contiguous(), table.contiguous()
    y = table.new_empty(len(index), table.shape[1])
    shape = (len(index), len(table), table.shape[1] * table.element_size(), offset)
    tensors = (index, table, y)
    try:
        library.run("qllm_embed", Embed(*shape, *map(pointer, tensors)), *tensors)
    except MemoryError:
        raise IndexError(f"an index is outside a table of {len(table)} rows") from None
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.layer_norm`."""
    return _norm(x, weight, bias, eps, centered=True)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`reference.rms_norm`."""
    return _norm(x, weight, None, eps, offset, centered=False)


def qk_norm(
    qkv: Tensor, weight: Tensor, heads: int, kv_heads: int, eps: float, offset: float = 0.0
) -> Tensor:
    """`reference.qk_norm`."""
    every = heads + 2 * kv_heads
    rows = qkv.reshape(len(qkv) * every, -1)
    runs = (every, heads, kv_heads)
    return _norm(rows, weight, None, eps, offset, centered=False, runs=runs).view(qkv.shape)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    *,
    centered: bool,
    runs: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    tensors = (x, like(x, weight), like(x, bias), y)
    shape = (*x.shape, centered, TYPES[x.dtype], eps, offset, *runs)
    library.run("qllm_norm", Norm(*shape, *map(pointer, tensors)), *tensors)
    return y


def activation(x: Tensor, name: str) -> Tensor:
    """`reference.activation`."""
    return _activate(x, name, gated=False)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """`reference.gated_activation`."""
    return _activate(x, name, gated=True)


def _activate(x: Tensor, name: str, *, gated: bool) -> Tensor:
    x = x.contiguous()
    rows, channels = x.shape[0], x.shape[1] // (2 if gated else 1)
    y = x.new_empty(rows, channels)
    kind = ACTIVATIONS.index(name)
    arguments = Activate(rows, channels, kind, gated, TYPES[x.dtype], pointer(x), pointer(y))
    library.run("qllm_activate", arguments, x, y)
    return y


def add(x: Tensor, z: Tensor) -> Tensor:
    """`reference.add`."""
    return _add(x.contiguous(), like(x, z), 1.0)


def scale(x: Tensor, factor: float) -> Tensor:
    """`reference.scale`."""
    return _add(x.contiguous(), None, factor)


def _add(x: Tensor, z: Tensor | None, factor: float) -> Tensor:
    y = torch.empty_like(x)
    tensors = (x, z, y)
    arguments = Add(x.numel(), TYPES[x.dtype], factor, *map(pointer, tensors))
    library.run("qllm_add", arguments, *tensors)
    return y


def _check_cache(qkv: Tensor, keys: Tensor, values: Tensor, tokens: int) -> None:
    """Refuse to write outside of keys and values (…, capacity, D)."""
    assert keys.is_contiguous() and values.is_contiguous()
    assert keys.dtype == values.dtype == qkv.dtype
    if tokens > keys.shape[-2]:
        raise IndexError(f"{tokens} tokens in a cache for {keys.shape[-2]}")


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    span: int,
    angles: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
) -> Tensor:
    """`reference.decode_attention`; rows attend to what their own positions say."""
    rows, kv_heads, capacity, dim = keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    _check_cache(qkv, keys, values, span)
    y = qkv.new_empty(rows, heads * dim)
    turns = [like(qkv, part) for part in angles or (None, None)]
    tensors = (qkv.contiguous(), positions.contiguous(), *turns, slopes, keys, values, y)
    shape = (rows, heads, kv_heads, dim, capacity, TYPES[qkv.dtype])
    library.run("qllm_attend", Attend(*shape, *map(pointer, tensors)), *tensors)
    return y


def prompt_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
) -> Tensor:
    """`reference.prompt_attention`."""
    kv_heads, capacity, dim = keys.shape
    length, heads = len(qkv), qkv.shape[1] // dim - 2 * kv_heads
    _check_cache(qkv, keys, values, length)
    y = qkv.new_empty(length, heads * dim)
    turns = [like(qkv, part) for part in angles or (None, None)]
    tensors = (qkv.contiguous(), *turns, slopes, keys, values, y)
    shape = (length, heads, kv_heads, dim, capacity, TYPES[qkv.dtype])
    library.run("qllm_attend_prompt", AttendPrompt(*shape, *map(pointer, tensors)), *tensors)
    return y
