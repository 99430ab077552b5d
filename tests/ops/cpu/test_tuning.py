"""What tunes a layer, on every path of this machine, beside the reference."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import pytest
import torch
from cpu_paths import DTYPES, normal, on
from torch import Tensor

from qllm.ops import reference
from qllm.ops.cpu import library as native
from qllm.ops.cpu import tuning
from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.reference import attention as reference_attention
from qllm.ops.rounding import Rounding
from qllm.quant.rtn import quantize_rtn
from qllm.quantizer.rounding import TunedRounding

SHAPES = ((1, 1), (3, 15), (5, 70), (2, 300))
STEPS = 4
# Sequences, tokens, heads, heads of keys, channels: more than a block of tokens, and not of whole
# vectors.
ATTENDED = ((1, 1, 1, 1, 1), (2, 65, 4, 2, 10), (1, 130, 2, 1, 34))


@pytest.fixture(params=native.PATHS)
def path(request):
    with on(request.param):
        yield request.param


def started(shape: tuple[int, int], bits: int, group: int, scheme: str, perm: bool) -> Rounding:
    """Where tuning begins, with ranges so narrow that some weights are beyond them."""
    weight = normal(*shape)
    order = torch.arange(shape[1]).roll(3).flip(0)
    packed = quantize_rtn(weight[:, order] if perm else weight, bits, group, scheme)
    state = TunedRounding(packed._replace(perm=order if perm else None), weight, bits, group).state
    state.factors.mul_(0.8)
    return state


def steps(
    run: object, state: Rounding, rounds: list[Tensor], matrix: Tensor, rows: slice
) -> list[Tensor]:
    """All that is written, behind a few steps of some of the rows."""
    for gradients in rounds:
        found = run(state.rows(rows), gradients[:, rows], 0.03, 0.02, matrix[rows])
        assert found.data_ptr() == matrix[rows].data_ptr()
    return [state.ideal, state.factors, state.ideal_exp_avg, state.factor_exp_avg, matrix]


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_a_step_is_the_references(path, dtype):
    cases = itertools.product(SHAPES, (2, 8), (-1, 16, 20), ("asym", "sym"), (False, True))
    for shape, bits, group, scheme, perm in cases:
        rounds = [normal(2, *shape, dtype=dtype) + step for step in range(STEPS)]
        found = [
            steps(
                run,
                started(shape, bits, group, scheme, perm),
                rounds,
                torch.zeros(shape, dtype=dtype),
                slice(shape[0] // 2, None),
            )
            for run in (tuning.step_rounding, reference.step_rounding)
        ]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_step_of_a_grid_that_is_far_too_fine(path):
    """Whose steps from a value to zero are more than an integer holds."""
    weight = normal(2, 16)
    found = []
    for run in (tuning.step_rounding, reference.step_rounding):
        state = TunedRounding(quantize_rtn(weight, 4, 16, "asym"), weight, 4, 16).state
        state.ideal.mul_(1e12)
        found.append(steps(run, state, [normal(1, 2, 16)], torch.zeros(2, 16), slice(None)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("path")
def test_a_step_is_that_of_any_number_of_threads():
    shape, before = (40, 1000), torch.get_num_threads()
    rounds = [normal(1, *shape) for _ in range(2)]
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            state = started(shape, 3, 64, "asym", False)
            found.append(
                steps(tuning.step_rounding, state, rounds, torch.empty(shape), slice(None))
            )
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_tuning_takes_the_kernel():
    weight = normal(4, 32)
    tuned = TunedRounding(quantize_rtn(weight, 2, 16, "asym"), weight, 2, 16)
    with patch.object(native, "run", wraps=native.run) as run:
        tuned.step(normal(1, 4, 32), 0.1, 0.1, torch.empty(4, 32))
    assert [call.args[0] for call in run.call_args_list] == ["step_rounding"]


def test_best_integers_are_the_references(path):
    """Of more channels than a vector has, and a part of a larger matrix of products."""
    for channels, rows in ((1, 1), (7, 3), (40, 33), (128, 70)):
        whole = normal(channels + 5, channels + 5)
        products = whole[2 : channels + 2, 3 : channels + 3]
        values = normal(channels, rows).mul(2).round().clamp(-3, 4)
        gradient, scales, step_sizes = normal(3, channels, rows)
        step_sizes[0, 0] = 1e12  # beyond what an integer holds, either way
        gradient[:, -1] = -1.0
        step_sizes[:, -1] = 4e9
        low = torch.full_like(values, -3)
        given = (products, values, gradient, scales.abs(), low, step_sizes.abs(), 7)
        before = [part.clone() for part in given[:-1]]
        ours, theirs = tuning.descend_block(*given), reference.descend_block(*given)
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])
        assert all(map(torch.equal, given[:-1], before))
        assert channels == 1 or (ours[0] != values).any()


def attended(
    run: object, qkv: Tensor, behind: Tensor, shape: tuple[int, ...], how: tuple
) -> tuple[Tensor, Tensor]:
    """What attention puts out, and the gradient by what it sees."""
    count, length, _, kv_heads, dim = shape
    rotation, slopes, scores = how
    leaf = qkv.clone().requires_grad_()
    kv = KV(*torch.empty(2, 1, kv_heads, length, dim))
    rotation = rotation and tuple(part.to(qkv.dtype) for part in rotation)
    y = run(leaf, kv, Batch.of([length] * count, "cpu"), rotation, slopes, scores)
    y.backward(behind)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_attention_are_the_references(path, dtype):
    """Those of autograd's own way back in float64."""
    for shape in ATTENDED:
        count, length, heads, kv_heads, dim = shape
        qkv = normal(count * length, (heads + 2 * kv_heads) * dim, dtype=dtype)
        behind = normal(count * length, heads * dim, dtype=dtype)
        angle = normal(count * length, dim)
        rotation = (angle.cos().to(dtype), angle.sin().to(dtype)) if dim % 2 == 0 else None
        slopes = torch.linspace(0.02, 0.3, heads)
        for how in (
            (rotation, None, PLAIN),
            (None, slopes, Scores(window=5)),
            (rotation, slopes, Scores(0.3, 2.0, window=70)),
            (rotation, None, Scores(0.1, sinks=torch.linspace(-1, 1, heads))),
        ):
            found = attended(tuning.differentiable_attention, qkv, behind, shape, how)
            given = (qkv.double(), behind.double(), shape, how)
            with patch.object(reference_attention._Attention, "apply", plain_attention):
                expected = attended(reference.differentiable_attention, *given)
            for ours, theirs in zip(found, expected, strict=True):
                error = torch.linalg.vector_norm(ours.double() - theirs)
                assert error <= 3 * torch.finfo(dtype).eps * torch.linalg.vector_norm(theirs)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention as autograd knows it."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    found = q @ k.mT * scores.factor(q.shape[-1])
    if scores.cap:
        found = (found / scores.cap).tanh() * scores.cap
    length = q.shape[2]
    unseen = torch.full((length, length), -torch.inf).triu(1)
    if mask.shape[-1] == length:
        found = found + mask
    sinks = torch.full((found.shape[1],), -torch.inf) if scores.sinks is None else scores.sinks
    joined = sinks.to(found.dtype)[:, None, None].expand(*found.shape[:-1], 1)
    return torch.cat((found + unseen, joined), -1).softmax(-1)[..., :-1] @ v


@pytest.mark.usefixtures("path")
def test_gradients_of_attention_are_those_of_any_number_of_threads():
    shape, before = (3, 70, 4, 2, 16), torch.get_num_threads()
    qkv, behind = normal(210, 128), normal(210, 64)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(
                attended(tuning.differentiable_attention, qkv, behind, shape, (None, None, PLAIN))
            )
        finally:
            torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
