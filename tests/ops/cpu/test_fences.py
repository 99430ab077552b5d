"""No kernel reads or writes a byte outside of its tensors: each lies at the edge of a fence.

A fence is a page of memory that may not be touched: who does dies, hence a process of its own.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import torch
from cpu_paths import (
    DTYPES,
    Int8,
    factored_weight,
    leveled_weight,
    normal,
    on,
    paths,
    random_weight,
)
from fences import fenced, mappings, run_in

from qllm.gguf.types import PACKED, UNBLOCKED
from qllm.ops import phase
from qllm.ops.cpu import delta, linear, steps, tuning
from qllm.ops.kv import KV, Batch, Scores
from qllm.ops.quantized_kv import RUN, QuantizedKV
from qllm.ops.recurrent import RecurrentState, StateShape
from qllm.ops.rounding import Rounding


def run_steps(dtype: torch.dtype, fence) -> None:
    for channels, rows in itertools.product((1, 2, 15, 17, 33, 70), (1, 3, 6)):
        x, z = map(fence, normal(2, rows, channels, dtype=dtype))
        one, two = map(fence, normal(2, channels, dtype=dtype))
        for name in steps.GATED_ACTIVATIONS:
            steps.gated_activation(fence(torch.cat([x, z], dim=1)), name)
        for name in steps.ACTIVATIONS:
            steps.activation(x, name)
        steps.layer_norm(x, one, two, 1e-5)
        steps.rms_norm(x, one, 1e-5)
        steps.add(x, z)
        steps.gather(x, fence(torch.arange(channels).flip(0)))
        steps.embedding(fence(torch.arange(rows)), z, 0)


def run_attention(dtype: torch.dtype, fence) -> None:
    for heads, kv_heads, dim in ((1, 1, 1), (4, 2, 2), (2, 1, 20), (2, 2, 34), (1, 1, 64)):
        slopes = fence(torch.ones(heads))
        scores = Scores(sinks=slopes)
        for length in (1, 3, 5, 33, 65):
            parts = heads + 2 * kv_heads
            qkv = fence(normal(length, parts * dim, dtype=dtype))
            rotation = [*map(fence, normal(2, length, dim, dtype=dtype))] if dim > 1 else None
            cache = KV(*map(fence, normal(2, 1, kv_heads, length, dim, dtype=dtype)))
            batch = Batch(*map(fence, Batch.of([length], "cpu")[:3]), length, length)
            steps.prefill_attention(qkv, cache, batch, rotation, slopes, scores)
            new = fence(normal(3, parts * dim, dtype=dtype))
            rotation = [*map(fence, normal(2, 3, dim, dtype=dtype))] if dim > 1 else None
            cache = KV(*map(fence, normal(2, 3, kv_heads, length, dim, dtype=dtype)))
            pasts = [length - 1, 0, length - 1]
            batch = Batch.of([1] * 3, "cpu", rows=[2, 0, 1], pasts=pasts)
            batch = Batch(*map(fence, batch[:3]), 1, length)
            steps.decode_attention(new, cache, batch, rotation, slopes, scores)


def run_quantized_attention(dtype: torch.dtype, fence) -> None:
    for bits, (heads, kv_heads, dim) in itertools.product((8, 4), ((1, 1, 1), (4, 2, 20))):
        kv = QuantizedKV.empty(bits, 2, kv_heads, 2 * RUN, dim, dtype, "cpu")
        kv = QuantizedKV(*map(fence, kv))
        new = fence(normal(RUN + 2, (heads + 2 * kv_heads) * dim, dtype=dtype))
        batch = Batch(*map(fence, Batch.of([RUN + 2], "cpu", rows=[1])[:3]), RUN + 2, RUN + 2)
        steps.prefill_attention(new, kv, batch, None, None)
        batch = Batch.of([1], "cpu", rows=[1], pasts=[2 * RUN - 1])
        batch = Batch(*map(fence, batch[:3]), 1, 2 * RUN)
        steps.decode_attention(new[:1], kv, batch, None, None)


def run_dense(dtype: torch.dtype, fence) -> None:
    for channels, rows in itertools.product((1, 2, 15, 17, 32, 33, 70, 300), (1, 3, 6, 14, 20)):
        x = fence(normal(rows, channels, dtype=dtype))
        for outputs in (1, 3, 16, 37, 69):
            weight, bias = normal(outputs, channels, dtype=dtype), normal(outputs, dtype=dtype)
            tensors = (x, fence(weight), fence(bias))
            linear.dense_linear(*tensors)
            with phase.decode():
                linear.dense_linear(*tensors)


def run_linear(dtype: torch.dtype, fence) -> None:
    for shape, rows in itertools.product(((1, 1), (13, 67), (33, 100)), (1, 3, 6, 40)):
        x, bias = fence(normal(rows, shape[1], dtype=dtype)), fence(normal(shape[0], dtype=dtype))
        for bits, group, scheme in (
            (3, 32, "asym"),
            (4, -1, "sym"),
            (6, 16, "offset"),
            (8, 20, "asym"),
        ):
            made = factored_weight if group == 16 else random_weight
            packed = made(shape, bits, group, scheme).packed
            tensors = [fence(part) for part in packed[:3]]
            for run in (linear.weight_only_linear, linear.weight_only_linear_int8):
                run(x, *tensors, bias, shape[0], bits, group)
        if shape == (33, 100):  # of one that is large enough
            packed = leveled_weight((165, 100), 7, 32, "asym").packed
            tensors = [fence(part) for part in packed[:3]]
            linear.weight_only_linear(x, *tensors, None, 165, 7, 32)
        packed = Int8.random(shape).packed
        for scale in (None, fence(torch.tensor(0.02))):
            tensors = [fence(part) for part in packed[:2]]
            linear.int8_linear(x, *tensors, bias, scale, shape[0])


def run_blocks(dtype: torch.dtype, fence) -> None:
    for kind, blocks in itertools.product(PACKED.values(), (1, 3)):
        if kind.name in UNBLOCKED:
            rows = torch.full((2, blocks * kind.nbytes), 0x35, dtype=torch.uint8)
            kind.to_packed(fence(rows))


def run_recurrent(dtype: torch.dtype, fence) -> None:
    for (key_dim, value_dim, heads), length in itertools.product(
        ((1, 1, 1), (20, 13, 2), (7, 70, 3)), (1, 3, 34)
    ):
        channels = (2 * key_dim + value_dim) * heads
        x, weight = fence(normal(length + 1, channels + 3, dtype=dtype)), normal(3, channels)
        state = RecurrentState.empty(
            2, StateShape(2, channels, heads, key_dim, value_dim), dtype, "cpu"
        )
        state = RecurrentState(*map(fence, state))
        batch = Batch.of([length, 1], "cpu", rows=[1, 0], pasts=[0, 2])
        batch = Batch(*map(fence, batch[:3]), length, length)
        qkv = fence(delta.causal_conv(x, fence(weight.to(dtype)), state, batch))
        gates, decay = normal(length + 1, 2 * heads, dtype=dtype), normal(2, heads)
        y = delta.delta_rule(qkv, fence(gates), fence(decay), state, batch)
        every = fence(torch.cat([y, y], dim=1))
        delta.gate(fence(y), every, y.shape[1], "silu")


def run_tuning(dtype: torch.dtype, fence) -> None:
    for (rows, columns), group in itertools.product(((1, 1), (3, 15), (2, 70)), (70, 16, 20)):
        groups = -(-columns // group)
        ideal, ideal_exp_avg = map(fence, normal(2, rows, groups, group))
        low, high = fence(-torch.ones(rows, groups)), fence(torch.ones(rows, groups))
        factors, factor_exp_avg = map(fence, normal(2, 2, rows, groups).abs())
        gradients = fence(normal(2, rows, columns, dtype=dtype))
        matrix = fence(torch.zeros(rows, columns, dtype=dtype))
        for perm in (None, fence(torch.arange(columns).flip(0))):
            tensors = (ideal, low, high, factors, ideal_exp_avg, factor_exp_avg, perm)
            state = Rounding(*tensors, columns, 3, False, torch.float16)
            tuning.step_rounding(state, gradients, 0.1, 0.1, matrix)
        products, parts = fence(normal(columns, columns)), map(fence, normal(5, columns, rows))
        tuning.descend_block(products, *parts, 7)
    for length, (heads, kv_heads, dim) in itertools.product((1, 5, 65), ((1, 1, 1), (4, 2, 20))):
        leaf = fence(normal(length, (heads + 2 * kv_heads) * dim, dtype=dtype)).requires_grad_()
        kv = KV(*normal(2, 1, kv_heads, length, dim))
        slopes, batch = fence(torch.ones(heads)), Batch.of([length], "cpu")
        scores = Scores(sinks=slopes)
        y = tuning.differentiable_attention(leaf, kv, batch, None, slopes, scores)
        y.backward(fence(normal(*y.shape, dtype=dtype)))


def run_all(path: str) -> None:
    """Every kernel, all tensors fenced: those that it is given and those that it makes."""
    print(path, flush=True)  # the last one is that on which the process died
    with on(path):
        for at_end, dtype in ((True, DTYPES[0]), (False, DTYPES[1]), (True, DTYPES[2])):
            fence = partial(fenced, at_end=at_end)
            torch.empty_like = lambda x, fence=fence: fence(torch.zeros_like(x))
            torch.Tensor.new_empty = lambda x, *shape, dtype=None, fence=fence: fence(
                torch.zeros(*shape, dtype=dtype or x.dtype)
            )
            for run in (
                run_steps,
                run_attention,
                run_quantized_attention,
                run_dense,
                run_linear,
                run_blocks,
                run_recurrent,
                run_tuning,
            ):
                run(dtype, fence)
                mappings.clear()


def test_nothing_outside_is_touched():
    done = run_in(Path(__file__), f"[run_all(path) for path in {paths()}]")
    assert done.returncode == 0, f"on {done.stdout.split()[-1:]}: {done.stderr}"
    assert done.stdout.split() == list(paths())


def test_a_fence_kills():
    for place in (-1, 5):
        tensor = f"fenced(torch.zeros(5, dtype=torch.uint8), at_end={place > 0})"
        done = run_in(
            Path(__file__),
            f"import ctypes; print(ctypes.string_at({tensor}.data_ptr() + {place}, 1))",
        )
        killed = done.returncode < 0 or "SEGV" in done.stderr  # a sanitizer says so, and exits
        assert killed and not done.stdout
