"""What is computed of each row, or element, by itself: norms, activations, embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from qllm.ops.reference.linear import Int8Rows, dequantize, quantize_rows
from qllm.quant.packing import PackedWeight


def embedding(index: Tensor, table: Tensor, offset: int) -> Tensor:
    """Rows `index + offset` of a table (V, C): (N, C)."""
    return F.embedding(index + offset, table)


def packed_embedding(
    index: Tensor,
    table: PackedWeight,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `index` of a packed table (V, C), dequantized: (N, C) in dtype."""
    zeros = table.qzeros[index] if table.qzeros.numel() else table.qzeros
    rows = (table.qweight[index], table.scales[index], zeros)
    return dequantize(*rows, bits, group_size, in_features, dtype)


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
    qkv: Tensor,
    weight: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    offset: float = 0.0,
    values: bool = False,
) -> Tensor:
    """`rms_norm` of each head of the queries and of the keys, the values left as they are.

    Args:
        qkv: (N, (H + 2 H_kv) D): the heads of the queries, then of the key, then of the value.
        weight: (2 D,), of the queries, then of the keys.
        values: those are normed as well, without a weight.

    Returns:
        as qkv.
    """
    parts = qkv.view(len(qkv), heads + 2 * kv_heads, -1).split([heads, kv_heads, kv_heads], dim=1)
    normed = [
        rms_norm(part.flatten(0, 1), each, eps, offset).view(part.shape)
        for part, each in zip(parts, weight.chunk(2), strict=False)
    ]
    last = rms_norm(parts[2].flatten(0, 1), None, eps).view(parts[2].shape) if values else parts[2]
    return torch.cat([*normed, last], dim=1).view(qkv.shape)


def wide_qk_norm(
    qkv: Tensor, weight: Tensor, queries: int, keys: int, eps: float, offset: float = 0.0
) -> Tensor:
    """`rms_norm` of all queries together, and of all keys, the values left as they are.

    Args:
        qkv: (N, C), whose columns are those of the queries, of the keys, and of the values.
        weight: (queries + keys,).
        queries, keys: how many columns they have.

    Returns:
        as qkv.
    """
    q, k, v = qkv.tensor_split([queries, queries + keys], dim=1)
    parts = zip((q, k), weight.split([queries, keys]), strict=True)
    return torch.cat([*(rms_norm(part, each, eps, offset) for part, each in parts), v], dim=1)


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
    "relu2": lambda x: F.relu(x).square(),
}

GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}

# gpt-oss's SwiGLU: gate and up are clamped, and the gate is swish with this factor.
SWIGLU_OAI, SWIGLU_ALPHA, SWIGLU_LIMIT = "swiglu_oai", 1.702, 7.0


def activation(x: Tensor, name: str) -> Tensor:
    """One of ACTIVATIONS of x (N, C)."""
    return ACTIVATIONS[name](x)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """f(gate) * up for x (N, 2 C), which is [gate; up]: (N, C).

    Args:
        name: one of ACTIVATIONS, or SWIGLU_OAI, which is gate' sigmoid(alpha gate') (up' + 1), of
            gate' = min(gate, limit) and up' = clamp(up, -limit, limit), rounded once.
    """
    gate, up = x.chunk(2, dim=-1)
    if name == SWIGLU_OAI:
        gate = gate.float().clamp(max=SWIGLU_LIMIT)
        up = up.float().clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return (gate * torch.sigmoid(gate * SWIGLU_ALPHA) * (up + 1)).to(x.dtype)
    return ACTIVATIONS[name](gate) * up


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Columns `index` (J,), int64, of x (N, C): (N, J)."""
    return x[:, index]


def join(x: Tensor, z: Tensor, columns: int) -> Tensor:
    """x (N, C) and behind it the last columns of z (N, D): (N, C + columns)."""
    return torch.cat([x, z[:, z.shape[1] - columns :]], dim=1)


def add(x: Tensor, z: Tensor) -> Tensor:
    """x + z, of one shape."""
    return x + z


def scale_rows(x: Tensor, factors: Tensor, columns: int) -> Tensor:
    """The first columns of each row of x (N, C) times its factor (N,), the others as they are."""
    scaled = x[:, :columns] * factors[:, None]
    return torch.cat((scaled, x[:, columns:]), dim=1)


def gate(x: Tensor, gates: Tensor, first: int, name: str) -> Tensor:
    """x (N, C) times a function of as many columns of gates (N, W), from `first` on.

    Args:
        name: "sigmoid" or "silu".
    """
    found = GATES[name](gates[:, first : first + x.shape[1]].float())
    return (x.float() * found).to(x.dtype)


def route(
    logits: Tensor, gate: Tensor | None, top_k: int, *, normalizes: bool
) -> tuple[Tensor, Tensor]:
    """Which experts each token takes, and how much each of them counts.

    Args:
        logits: of the router, (N, E).
        gate: (N, 1), of an expert that all tokens take beside those, whose weight is its logistic
            function; None: there is none.
        top_k: how many experts a token takes: those of the largest of the softmax, of equal ones
            the first.
        normalizes: the weights of a token's experts are divided by their sum.

    Returns:
        weights float32 (N, top_k), and the experts int64 (N, top_k); with a gate one more of each,
        the last, of expert E.
    """
    weights, chosen = logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weights, chosen = weights[:, :top_k], chosen[:, :top_k]
    if normalizes:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if gate is None:
        return weights.contiguous(), chosen.contiguous()
    shared = torch.full_like(gate, logits.shape[1], dtype=chosen.dtype)
    return torch.cat([weights, gate.float().sigmoid()], dim=1), torch.cat([chosen, shared], dim=1)


def scale(x: Tensor, factor: float) -> Tensor:
    """x times a number."""
    return x * factor
