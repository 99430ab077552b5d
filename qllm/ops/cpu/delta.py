"""Layers with a recurrent state; see `reference` for what each op computes."""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.ops.cpu import library
from qllm.ops.cpu.interface import Convolution, DeltaRule, Gate
from qllm.ops.cpu.library import TYPES, pointer
from qllm.ops.kv import Batch
from qllm.ops.recurrent import RecurrentState

GATES = {"silu": 3, "sigmoid": 6}  # as in kernels.h


def gate(x: Tensor, gates: Tensor, first: int, name: str) -> Tensor:
    """`reference.gate`."""
    x, gates = x.contiguous(), gates.to(x.dtype).contiguous()
    y = torch.empty_like(x)
    tensors = (x, gates, y)
    shape = (*x.shape, gates.shape[1], first, GATES[name], TYPES[x.dtype])
    library.run("gate", Gate(*shape, *map(pointer, tensors)), *tensors)
    return y


def causal_conv(x: Tensor, weight: Tensor, state: RecurrentState, batch: Batch) -> Tensor:
    """`reference.causal_conv`; where a run of tokens begins and ends changes no bit."""
    x, weight = x.contiguous(), weight.to(x.dtype).contiguous()
    kernel, channels = weight.shape
    assert state.inputs.dtype == x.dtype
    y = x.new_empty(len(x), channels)
    index = (batch.rows, batch.starts, batch.positions)
    tensors = (x, weight, *index, state.inputs, y)
    shape = (len(batch.rows), channels, x.shape[1], kernel, TYPES[x.dtype])
    library.run("causal_conv", Convolution(*shape, *map(pointer, tensors)), *tensors)
    return y


def delta_rule(
    qkv: Tensor, gates: Tensor, decay: Tensor, state: RecurrentState, batch: Batch
) -> Tensor:
    """`reference.delta_rule`; where a run of tokens begins and ends changes no bit."""
    qkv, gates = qkv.contiguous(), gates.to(qkv.dtype).contiguous()
    _, heads, key_dim, value_dim = state.memory.shape
    key_heads = (qkv.shape[1] - heads * value_dim) // (2 * key_dim)
    y = qkv.new_empty(len(qkv), heads * value_dim)
    index = (batch.rows, batch.starts, batch.positions)
    tensors = (qkv, gates, decay, *index, state.memory, y)
    shape = (len(batch.rows), key_heads, heads, key_dim, value_dim, TYPES[qkv.dtype])
    library.run("delta_rule", DeltaRule(*shape, *map(pointer, tensors)), *tensors)
    return y
