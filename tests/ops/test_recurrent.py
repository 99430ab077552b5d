"""The ops of layers with a recurrent state: what stays in it, and gradients."""

from __future__ import annotations

import pytest
import torch
from cpu_paths import DTYPES, on, same
from recurrent_examples import normal, random_state

from qllm.ops import differentiable_on, kernels_on, reference
from qllm.ops.cpu import delta
from qllm.ops.cpu import library as native
from qllm.ops.kv import Batch
from qllm.ops.recurrent import RecurrentState, StateShape

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM, KERNEL = 4, 2, 12, 70, 4
CHANNELS = 2 * KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM
SHAPE = StateShape(KERNEL - 1, CHANNELS, HEADS, KEY_DIM, VALUE_DIM)
TOKENS = 77  # more than kernels take at once


def tensors(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, weight = normal(tokens, CHANNELS + 3).to(dtype), normal(KERNEL, CHANNELS).to(dtype)
    return x, weight, normal(tokens, 2 * HEADS).to(dtype), normal(2, HEADS)


def run(ops, state: RecurrentState, batch: Batch, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, weight, gates, decay = given
    convolved = ops.causal_conv(x, weight, state, batch)
    return ops.delta_rule(convolved, gates, decay, state, batch)


@pytest.mark.parametrize("path", native.PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_where_a_text_is_cut_or_on_others(path, dtype):
    given = tensors(TOKENS, dtype)
    with on(path):
        whole = random_state(1, SHAPE, dtype)
        want = run(delta, whole, Batch.of([TOKENS], "cpu"), given)
        state, found, start = random_state(3, SHAPE, dtype), [], 0
        for length in (1, 2, 40, 1, TOKENS - 44):
            cut = [part[start : start + length] for part in given[:1] + given[2:3]]
            other = [torch.cat([part, part.flip(0)]) for part in cut]
            batch = Batch.of([length, length], "cpu", rows=[2, 0], pasts=[start, start])
            y = run(delta, state, batch, (other[0], given[1], other[1], given[3]))
            found.append(y[:length])
            start += length
        assert same(torch.cat(found), want)
        for part, expected in zip(state, whole, strict=True):
            assert same(part[2], expected[0])


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_the_state_is_that_of_the_tokens(kernels):
    ops = reference if kernels == "reference" else kernels_on("cpu")
    given = tensors(9, torch.float32)
    state, want = random_state(2, SHAPE, torch.float32), random_state(2, SHAPE, torch.float32)
    run(ops, state, Batch.of([9], "cpu", rows=[1]), given)
    run(reference, want, Batch.of([9], "cpu", rows=[1]), given)
    assert torch.equal(state.inputs[1], given[0][-3:, :CHANNELS])
    torch.testing.assert_close(state.memory, want.memory)
    assert torch.equal(state.memory[0], random_state(2, SHAPE, torch.float32).memory[0])


def test_gradients_are_those_of_the_specification():
    lengths = [70, 70]
    given = tensors(140, torch.float32)

    def total(ops, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        state = RecurrentState.empty(2, SHAPE, torch.float32, "cpu")
        y = run(ops, state, Batch.of(lengths, "cpu"), (x, given[1], gates, given[3]))
        return (y * normal(*y.shape)).double().sum()

    leaves = [given[i].clone().requires_grad_() for i in (0, 2)]
    found = total(differentiable_on("cpu"), *leaves)
    assert (found - total(reference, given[0], given[2])).abs() < 1e-4 * found.abs()
    found.backward()
    for seed in range(3):  # along a direction, from differences of the specification's values
        ways = [normal(*leaf.shape, seed + 1)[..., seed] for leaf in leaves]
        slope = sum(
            (leaf.grad * way).double().sum() for leaf, way in zip(leaves, ways, strict=True)
        )
        ends = [
            total(
                reference,
                *(leaf.detach() + sign * way for leaf, way in zip(leaves, ways, strict=True)),
            )
            for sign in (1e-3, -1e-3)
        ]
        assert abs((ends[0] - ends[1]) / 2e-3 - slope) < 5e-3 * abs(slope) + 1e-2
