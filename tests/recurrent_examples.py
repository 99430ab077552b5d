"""Of the ops of layers with a recurrent state: arguments, and the exact result."""

from __future__ import annotations

from functools import partial

import exact
import numpy as np
import torch

from qllm.ops import Request
from qllm.ops.kv import Batch
from qllm.ops.recurrent import RecurrentState, StateShape

PAST = 2  # tokens that a sequence which goes on has had


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def passes(rows: int, *, prompt: bool) -> tuple[list[int], list[int]]:
    """How many tokens each sequence has in a pass of so many rows, and has had."""
    if prompt:
        return [rows - rows // 3, *([rows // 3] if rows // 3 else [])], [0, PAST][: 1 + rows // 3]
    return [1] * rows, [0, *[PAST] * (rows - 1)]


def random_state(count: int, shape: StateShape, dtype: torch.dtype) -> RecurrentState:
    """With something in it, which a sequence that begins does not see."""
    inputs = normal(count, shape.past, shape.channels).to(dtype)
    return RecurrentState(inputs, normal(count, *shape[2:]))


def conv_example(request: Request, rows: int, dtype: torch.dtype, *, prompt: bool, kernel: int):
    channels = request.in_features
    lengths, pasts = passes(rows, prompt=prompt)
    x, weight = normal(rows, channels + 3).to(dtype), normal(kernel, channels).to(dtype)
    state = random_state(len(lengths), StateShape(kernel - 1, channels, 1, 1, 1), dtype)
    wanted, size = [], 0.0
    start = 0
    for row, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        before = exact.numpy(state.inputs[row]) * (past > 0)
        seen = np.concatenate([before, exact.numpy(x)[start : start + length, :channels]])
        for token in range(length):
            terms = seen[token : token + kernel] * exact.numpy(weight)
            wanted.append(exact.ACTIVATIONS["silu"](terms.sum(0)))
            size = max(size, np.abs(terms).sum(0).max())
        start += length
    batch = Batch.of(lengths, "cpu", pasts=pasts)
    arguments = {"x": x, "weight": weight, "state": state, "batch": batch}
    return arguments, np.stack(wanted), size


def delta_example(request: Request, rows: int, dtype: torch.dtype, *, prompt: bool, share: int):
    key_heads, key_dim, value_dim = 2, request.in_features, request.out_features
    heads = key_heads * share
    lengths, pasts = passes(rows, prompt=prompt)
    qkv = normal(rows, 2 * key_heads * key_dim + heads * value_dim).to(dtype)
    gates, decay = normal(rows, 2 * heads).to(dtype), normal(2, heads)
    state = random_state(len(lengths), StateShape(0, 0, heads, key_dim, value_dim), dtype)
    parts = [exact.numpy(part) for part in (qkv, gates, decay)]
    start, wanted, size = 0, [], 0.0
    for row, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        memory = exact.numpy(state.memory[row]) * (past > 0)
        run = slice(start, start + length)
        found, largest = exact.delta_rule(parts[0][run], parts[1][run], parts[2], memory)
        wanted.append(found)
        start, size = start + length, max(size, largest)
    batch = Batch.of(lengths, "cpu", pasts=pasts)
    arguments = {"qkv": qkv, "gates": gates, "decay": decay, "state": state, "batch": batch}
    return arguments, np.concatenate(wanted), size


def gate_example(request: Request, rows: int, dtype: torch.dtype, *, name: str):
    columns = request.in_features
    x, gates = normal(rows, columns).to(dtype), normal(rows, columns + 5).to(dtype)
    by = exact.numpy(gates)[:, 3 : 3 + columns]
    by = 1 / (1 + np.exp(-by)) if name == "sigmoid" else exact.ACTIVATIONS[name](by)
    y = exact.numpy(x) * by
    return {"x": x, "gates": gates, "first": 3, "name": name}, y, np.abs(y).max()


RECURRENT = {
    "gate": tuple(partial(gate_example, name=name) for name in ("sigmoid", "silu")),
    "causal_conv": tuple(
        partial(conv_example, prompt=prompt, kernel=kernel)
        for prompt, kernel in ((True, 4), (False, 4), (True, 1), (True, 3))
    ),
    "delta_rule": tuple(
        partial(delta_example, prompt=prompt, share=share)
        for prompt, share in ((True, 1), (False, 2), (True, 3))
    ),
}
