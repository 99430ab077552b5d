"""What the ops between linear layers compute, in float64, and how near a kernel has to come."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from qllm.ops.kv import PLAIN, Scores

# Of float32, by which sums of a kernel may be off, in proportion to the size of what they sum.
ULPS = 4


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * np.vectorize(math.erfc)(-x / math.sqrt(2))


@np.errstate(over="ignore")
def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@np.errstate(over="ignore")
def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def relu2(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) ** 2


ACTIVATIONS = {each.__name__: each for each in (relu, gelu, gelu_tanh, silu, relu2)}


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centered: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A norm of each row, and the size of what it sums up."""
    x = numpy(x)
    mean = x.mean(1, keepdims=True) if centered else 0.0
    scale = 1 / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + eps)
    y, size = (x - mean) * scale, (np.abs(x) + np.abs(x).mean(1, keepdims=True)) * scale
    if weight is not None:
        y, size = y * numpy(weight), size * np.abs(numpy(weight))
    if bias is not None:
        y, size = y + numpy(bias), size + np.abs(numpy(bias))
    return y, size


def rotate(x: np.ndarray, angles: tuple[Tensor, Tensor] | None) -> np.ndarray:
    """Heads (N, H, D) rotated by cosines and sines (N, D): pairs are (i, i + D / 2)."""
    if angles is None:
        return x
    cos, sin = (numpy(part)[:, None] for part in angles)
    half = x.shape[2] // 2
    swapped = np.concatenate([-x[:, :, half:], x[:, :, :half]], axis=2)
    return x * cos + swapped * sin


def attention(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    slopes: np.ndarray | None,
    how: Scores = PLAIN,
) -> tuple[np.ndarray, np.ndarray]:
    """The last token's attention: query (H, D), keys and values (H_kv, S, D).

    Returns:
        (H, D), and the size (H, 1) to which its errors are in proportion.
    """
    (heads, dim), (kv_heads, length, _) = query.shape, keys.shape
    keys, values = (np.repeat(part, heads // kv_heads, axis=0) for part in (keys, values))
    factor = 1 / math.sqrt(dim) if how.scale is None else how.scale
    scores = np.einsum("hd,hsd->hs", query, keys) * factor
    sizes = np.einsum("hd,hsd->hs", np.abs(query), np.abs(keys)) * factor
    if how.cap:
        scores = how.cap * np.tanh(scores / how.cap)
    if slopes is not None:
        bias = slopes[:, None] * np.arange(1 - length, 1)
        scores, sizes = scores + bias, sizes + np.abs(bias)
    if how.sinks is not None:
        sinks = numpy(how.sinks)[:, None]
        scores, sizes = (
            np.concatenate(both, axis=1) for both in ((scores, sinks), (sizes, abs(sinks)))
        )
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights = (weights / weights.sum(1, keepdims=True))[:, :length]
    size = (1 + sizes.max(1)) * np.abs(values).max((1, 2))
    return np.einsum("hs,hsd->hd", weights, values), size[:, None]


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def int8_blocks(x: Tensor, group_size: int) -> np.ndarray:
    """Rows of x (M, K) as int8 would hold them: blocks of 128 of a group share the step m / 127.

    Steps and quotients are float32, each rounded once: halves have to fall as they do there.
    """
    values = x.float().numpy()
    rounded = np.empty(values.shape)
    columns = np.arange(x.shape[1])
    group, place = np.divmod(columns, x.shape[1] if group_size == -1 else group_size)
    for block in set(zip(group, place // 128, strict=True)):
        run = (group == block[0]) & (place // 128 == block[1])
        for row in range(len(values)):
            step = np.abs(values[row, run]).max() / np.float32(127)
            step = step if step else np.float32(1)
            quotients = np.clip(np.rint(values[row, run] / step), -127, 127)
            rounded[row, run] = quotients.astype(np.float64) * step
    return rounded


def assert_rounded_once(
    got: Tensor, exact: np.ndarray, size: np.ndarray | float, ulps: float = ULPS
) -> None:
    """No further off than a result in float32 of sums of this size, rounded to the type of `got`.

    In float32 that is what plain torch ops come to; in half types they round more often.
    """
    assert got.shape == exact.shape
    info = torch.finfo(got.dtype)
    subnormal = info.smallest_normal * info.eps
    allowed = np.abs(exact) * info.eps / 2 + 4 * subnormal
    allowed = allowed + ulps * torch.finfo(torch.float32).eps * size
    ratio = np.abs(numpy(got) - exact) / allowed
    assert not (ratio > 1).any() and not np.isnan(ratio).any(), f"{ratio.max():.3} of what may be"


def step_rounding(
    ideal: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    factors: np.ndarray,
    ideal_exp_avg: np.ndarray,
    factor_exp_avg: np.ndarray,
    gradient: np.ndarray,
    qmax: int,
    rate: float,
    range_rate: float,
) -> np.ndarray:
    """A matrix (N, K) behind a step of its roundings and ranges, see `qllm.ops.rounding.Rounding`.

    Args:
        gradient: of the loss by the matrix, (N, K).
        qmax: the largest integer.
    """

    def grid(ends: np.ndarray) -> tuple[np.ndarray, ...]:
        scales = (high * ends[1] - low * ends[0]) / qmax
        zeros = np.rint(-low * ends[0] / scales).clip(0, qmax)
        return scales[..., None], zeros[..., None]

    columns = gradient.shape[1]
    padded = np.zeros((len(ideal), ideal[0].size))
    padded[:, :columns] = gradient
    gradient = padded.reshape(ideal.shape)
    scales, zeros = grid(factors)
    q = np.rint(ideal / scales) + zeros
    inside = (q >= 0) & (q <= qmax)
    grad_weight = np.where(inside, gradient, 0)
    # dW/ds and dW/dz of W = s (clamp(w / s + z) - z) with a straight-through rounding.
    grad_scale = (gradient * (q.clip(0, qmax) - zeros - inside * ideal / scales)).sum(-1)
    grad_zero = (gradient * np.where(inside, 0, -scales)).sum(-1)
    # s = (h - l) / qmax and z = -l / s, of the ends l = low f0 and h = high f1.
    scale, lowest = scales[..., 0], low * factors[0]
    grad_low = grad_scale * (-low / qmax) + grad_zero * (
        -low / scale - lowest * low / qmax / scale**2
    )
    grad_high = grad_scale * (high / qmax) + grad_zero * (lowest * high / qmax / scale**2)
    move = np.sign(0.9 * ideal_exp_avg + 0.1 * grad_weight)
    ideal = ideal - rate * move * scales
    moves = np.sign(0.9 * factor_exp_avg + 0.1 * np.stack((grad_low, grad_high)))
    scales, zeros = grid((factors - range_rate * moves).clip(0.1, 1.2))
    values = scales * (np.rint(ideal / scales).clip(-zeros, qmax - zeros))
    return values.reshape(len(ideal), -1)[:, :columns]


def descend_block(
    products: np.ndarray,
    values: np.ndarray,
    gradient: np.ndarray,
    scales: np.ndarray,
    low: np.ndarray,
    step_sizes: np.ndarray,
    qmax: int,
) -> np.ndarray:
    """The integers and moves (2, k, n) that channels take one after the other.

    Each minimizes its own parabola, with the moves of all channels in front of it.
    """
    before, values = values, values.astype(np.float64)
    moves = np.zeros_like(values)
    for i in range(len(values)):
        slope = gradient[i] + products[:i, i] @ moves[:i]
        values[i] = np.rint(before[i] - slope * step_sizes[i]).clip(low[i], low[i] + qmax)
        moves[i] = (values[i] - before[i]) * scales[i]
    return np.stack((values, moves))


def route(logits: np.ndarray, top_k: int, normalizes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the experts that each token takes, (N, top_k), and which they are."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(shares, chosen, axis=1)
    return weights / weights.sum(axis=1, keepdims=True) if normalizes else weights, chosen


def delta_rule(
    qkv: np.ndarray, gates: np.ndarray, decay: np.ndarray, memory: np.ndarray
) -> tuple[np.ndarray, float]:
    """Outputs (T, H D_v) of one sequence, and the largest sum of absolute values in one.

    Args:
        memory: (H, D_k, D_v), of the tokens before.
    """
    heads, key_dim, value_dim = memory.shape
    keys = (qkv.shape[1] - heads * value_dim) // 2
    q, k, v = np.split(qkv, [keys, 2 * keys], axis=1)
    found, size = [], 0.0
    for token in range(len(qkv)):
        outputs = []
        for head in range(heads):
            own = head * keys // key_dim // heads * key_dim
            query, key = q[token, own : own + key_dim], k[token, own : own + key_dim]
            query, key = (part / np.sqrt((part**2).sum() + 1e-6) for part in (query, key))
            value = v[token, head * value_dim : (head + 1) * value_dim]
            rate = 1 / (1 + np.exp(-gates[token, head]))
            fade = np.log1p(np.exp(gates[token, heads + head] + decay[1, head]))
            faded = memory[head] * np.exp(-np.exp(decay[0, head]) * fade)
            memory[head] = faded + np.outer(key, (value - key @ faded) * rate)
            terms = memory[head] * query[:, None] / np.sqrt(key_dim)
            outputs.append(terms.sum(0))
            size = max(size, np.abs(terms).sum(0).max())
        found.append(np.concatenate(outputs))
    return np.stack(found), size
