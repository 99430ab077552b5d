"""The gated delta rule (Yang et al. 2024), and the convolution in front of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qllm.ops.kv import Batch
from qllm.ops.recurrent import RecurrentState, runs

# Added to a sum of squares, in front of the root.
NORM_EPS = 1e-6


def causal_conv(x: Tensor, weight: Tensor, state: RecurrentState, batch: Batch) -> Tensor:
    """SiLU of a convolution of each channel over a token and those in front of it.

    Args:
        x: (N, C or more), of which the first C columns take part.
        weight: (K, C), the last row being the token's own.
        state: of the layer, whose `inputs` are read and replaced.
        batch: which tokens these are.

    Returns:
        (N, C).
    """
    kernel, channels = weight.shape
    y = x.new_empty(len(x), channels)
    for row, run, begins in runs(batch):
        past = state.inputs[row]
        seen = torch.cat([torch.zeros_like(past) if begins else past, x[run, :channels]])
        windows = seen.unfold(0, kernel, 1)  # (T, C, K)
        y[run] = F.silu((windows.float() * weight.t().float()).sum(dim=-1)).to(x.dtype)
        state.inputs[row] = seen[len(seen) - kernel + 1 :]
    return y


def delta_rule(
    qkv: Tensor, gates: Tensor, decay: Tensor, state: RecurrentState, batch: Batch
) -> Tensor:
    """What queries find in a memory that each token first fades, and then corrects at its key.

    With a token's key k, value v, decay a and rate b: S <- a S; S <- S + k b (v - S^T k)^T, and its
    output is S^T q. Queries and keys are normed to a length of 1, and queries divided by sqrt(D_k).

    Args:
        qkv: (N, 2 H_k D_k + H D_v): heads of queries, of keys, of values. H / H_k heads of values
            in a row share a head of queries and keys.
        gates: (N, 2 H): of each head what b is the logistic function of, and what a comes from.
        decay: float32 (2, H), the logarithm of A, and a bias: a = exp(-A softplus(gate + bias)).
        state: of the layer, whose `memory` is read and replaced.
        batch: which tokens these are.

    Returns:
        (N, H D_v).
    """
    _, heads, key_dim, value_dim = state.memory.shape
    q, k, v, rates, fades = split(qkv, gates, decay, heads, key_dim, value_dim)
    y = torch.empty_like(v)
    for row, run, begins in runs(batch):
        memory = state.memory[row]
        if begins:
            memory.zero_()
        for token in range(run.start, run.stop):
            memory *= fades[token, :, None, None]
            found = (memory * k[token, :, :, None]).sum(dim=1)
            change = (v[token] - found) * rates[token, :, None]
            memory += k[token, :, :, None] * change[:, None]
            y[token] = (memory * q[token, :, :, None]).sum(dim=1)
    return y.flatten(1).to(qkv.dtype)


def split(
    qkv: Tensor, gates: Tensor, decay: Tensor, heads: int, key_dim: int, value_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the delta rule takes: q and k (N, H, D_k), v (N, H, D_v), b and a (N, H), in float32."""
    keys = (qkv.shape[1] - heads * value_dim) // 2
    q, k, v = qkv.float().split([keys, keys, heads * value_dim], dim=1)
    q, k = (part.unflatten(1, (-1, key_dim)) for part in (q, k))
    q, k = (part * (part.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt() for part in (q, k))
    q, k = (part.repeat_interleave(heads * key_dim // keys, dim=1) for part in (q, k))
    rates, fades = gates.float().split(heads, dim=1)
    fades = (-decay[0].exp() * F.softplus(fades + decay[1])).exp()
    return q * key_dim**-0.5, k, v.unflatten(1, (heads, value_dim)), rates.sigmoid(), fades


# Tokens of a sequence that a product takes at once, where gradients go through the rule.
CHUNK = 64


def differentiable_conv(x: Tensor, weight: Tensor, state: RecurrentState, batch: Batch) -> Tensor:
    """`causal_conv` of B whole sequences of one length T, all at once: (B T, C).

    Gradients go through it: nothing is written to the state.
    """
    kernel, channels = weight.shape
    seen = F.pad(x[:, :channels].unflatten(0, (-1, batch.span)).float(), (0, 0, kernel - 1, 0))
    runs = (seen[:, i : i + batch.span] * row for i, row in enumerate(weight.float()))
    return F.silu(sum(runs, torch.zeros((), device=x.device))).flatten(0, 1).to(x.dtype)


def differentiable_delta_rule(
    qkv: Tensor, gates: Tensor, decay: Tensor, state: RecurrentState, batch: Batch
) -> Tensor:
    """`delta_rule` of B whole sequences of one length T, all at once: (B T, H D_v).

    Gradients go through it: nothing is written to the state. The changes of CHUNK tokens are the
    solution of one triangular system (Yang et al. 2024), so that they are a few products.
    """
    _, heads, key_dim, value_dim = state.memory.shape
    parts = split(qkv, gates, decay, heads, key_dim, value_dim)
    q, k, v, rates, fades = (  # (B, H, T, …)
        part.unflatten(0, (-1, batch.span)).transpose(1, 2) for part in parts
    )
    memory = q.new_zeros(*q.shape[:2], key_dim, value_dim)
    found = []
    for start in range(0, batch.span, CHUNK):
        run = slice(start, start + CHUNK)
        queries, keys, values = q[:, :, run], k[:, :, run], v[:, :, run]
        rate = rates[:, :, run, None]
        faded = fades[:, :, run].clamp(min=torch.finfo(torch.float32).tiny).log().cumsum(-1)
        # What is left at token i of what token j has put in.
        left = (faded[..., None] - faded[..., None, :]).tril().exp().tril()
        since = faded.exp()[..., None]  # and of what was there before
        system = rate * (keys @ keys.mT) * left
        wanted = rate * (values - since * (keys @ memory))
        changes = torch.linalg.solve_triangular(
            system.tril(-1), wanted, upper=False, unitriangular=True
        )
        found.append(since * (queries @ memory) + (queries @ keys.mT * left) @ changes)
        until = (faded[..., -1:] - faded).exp()[..., None]
        memory = memory * since[:, :, -1:] + (keys * until).mT @ changes
    return torch.cat(found, dim=2).transpose(1, 2).flatten(0, 1).flatten(1).to(qkv.dtype)
