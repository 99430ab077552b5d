"""Keys and values of 8 and 4 bits: what they are, and attention to them on every path."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cpu_paths import normal, on, paths, same
from torch import Tensor

from qllm.ops import reference
from qllm.ops.cpu import library, steps
from qllm.ops.kv import KV, PLAIN, Batch, Scores
from qllm.ops.quantized_kv import BASES, RUN, QuantizedKV, quantize

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 3 * RUN + 7
bits_of = pytest.mark.parametrize("bits", [8, 4])


def tokens(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """qkv of a sequence, some of whose keys' channels lie far from 0, as those of models do."""
    heads, kv_heads, dim = shape
    qkv = normal(LENGTH, heads + 2 * kv_heads, dim)
    qkv[:, heads : heads + kv_heads, 1] += 20
    qkv[:, heads : heads + kv_heads, dim // 2] *= 8
    return qkv.flatten(1).to(dtype)


def empty(bits: int, shape: tuple[int, int, int], dtype: torch.dtype, rows: int = 2) -> QuantizedKV:
    return QuantizedKV.empty(bits, rows, shape[1], LENGTH, shape[2], dtype, "cpu")


def decoded(
    run: Callable, qkv: Tensor, kv: QuantizedKV, slopes: Tensor | None, scores: Scores = PLAIN
) -> Tensor:
    """One token at a time, in row 1."""
    batches = (Batch.of([1], "cpu", rows=[1], pasts=[i]) for i in range(len(qkv)))
    return torch.cat(
        [run(qkv[i : i + 1], kv, batch, None, slopes, scores) for i, batch in enumerate(batches)]
    )


def codes(kv: QuantizedKV, row: int) -> tuple[Tensor, ...]:
    """What a row holds but for its newest run."""
    return tuple(part[row] for part in kv[:6])


@bits_of
def test_integers_stand_for_their_numbers(bits):
    """To half a step of the range, wherever it lies; a value that is not finite spoils its own."""
    x = normal(6, 40) * torch.tensor([1.0, 1e-20, 1e20, 1.0, 0.0, 1.0])[:, None]
    x[3] = x[3] * 0.1 + 7
    found, scales, zeros = quantize(x, bits, dim=1)
    back = (found.double() - zeros.double() + BASES[bits]) * scales.double()
    span = x.amax(1) - x.amin(1)
    if bits == 8:
        span = x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)
    else:  # a zero is a byte: far from 0 steps are larger
        span = torch.maximum(span, x.amin(1).clamp(min=0) / 127 * 15)
    # A scale is rounded to bfloat16, by which the ends may lie a little outside.
    allowed = span.double() / (2**bits - 1) * (0.5 + 2**bits / 256) + 1e-30
    assert ((back - x).abs().amax(1) <= allowed).all()
    x[5, 7] = torch.nan
    x[2, 3] = torch.inf
    found, scales, zeros = quantize(x, bits, dim=1)
    assert scales[:, 0].isnan().tolist() == [False, False, True, False, False, True]


@bits_of
def test_bytes(bits):
    """At a context of 4096 at most 0.54 and 0.30 of 16 bits; and as many as tensors have."""
    for heads, dim in ((4, 64), (2, 128), (3, 80)):
        shape = (bits, heads, 4096, dim, torch.bfloat16)
        size = QuantizedKV.row_bytes(*shape)
        assert size <= {8: 0.54, 4: 0.30}[bits] * KV.row_bytes(*shape)
        kv = QuantizedKV.empty(bits, 3, heads, 4096, dim, torch.bfloat16, "cpu")
        assert sum(part.nbytes for part in kv) == 3 * size


@bits_of
def test_the_reference_sees_earlier_runs_as_integers(bits):
    """Against a computation in float64, of what KIVI says that each token sees."""
    heads, kv_heads, dim = shape = (4, 2, 20)
    qkv, kv = tokens(shape), empty(bits, shape, torch.float32)
    got = reference.prefill_attention(qkv, kv, Batch.of([LENGTH], "cpu", rows=[1]), None, None)
    q, k, v = qkv.view(LENGTH, -1, dim).split([heads, kv_heads, kv_heads], 1)
    rough = [k.clone(), v.clone()]
    for part, axis in zip(rough, (0, 2), strict=True):
        for start in range(0, LENGTH - RUN + 1, RUN):
            found, scales, zeros = quantize(part[start : start + RUN], bits, axis)
            part[start : start + RUN] = (found - zeros.float() + BASES[bits]) * scales.float()
    want = []
    for i in range(LENGTH):
        own = i // RUN * RUN
        keys, values = (
            torch.cat([part[:own], exact[own : i + 1]]).repeat_interleave(2, 1).double().numpy()
            for part, exact in zip(rough, (k, v), strict=True)
        )
        weights = np.exp(np.einsum("hd,jhd->hj", q[i].double().numpy(), keys) / dim**0.5)
        weights /= weights.sum(1, keepdims=True)
        want.append(np.einsum("hj,jhd->hd", weights, values).ravel())
    assert np.abs(got.double().numpy() - np.stack(want)).max() < 1e-5
    assert same(decoded(reference.decode_attention, qkv, kv, None), got) or torch.allclose(
        decoded(reference.decode_attention, qkv, kv, None), got, atol=1e-5
    )


SHAPES = ((6, 2, 32), (2, 2, 20), (8, 1, 64), (1, 1, 130))


@pytest.mark.covering(2)
@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@bits_of
def test_kernels_hold_the_reference_s_integers(bits, dtype, path):
    """And compute what it does, of prompts in runs of any size, and of tokens one by one."""
    for i, shape in enumerate(SHAPES):
        qkv = tokens(shape, dtype)
        slopes = torch.linspace(0.01, 0.5, shape[0]) if i % 2 else None
        scores = (PLAIN, Scores(window=100), Scores(cap=5.0, scale=0.2), PLAIN)[i]
        whole = Batch.of([LENGTH], "cpu", rows=[1])
        kvs = [empty(bits, shape, dtype) for _ in range(4)]
        want = reference.prefill_attention(qkv, kvs[0], whole, None, slopes, scores)
        with on(path):
            got = steps.prefill_attention(qkv, kvs[1], whole, None, slopes, scores)
            pieces, past = [], 0
            for length in (5, RUN, 1, RUN + 2, LENGTH - 2 * RUN - 8):
                batch = Batch.of([length], "cpu", rows=[1], pasts=[past])
                run = qkv[past : past + length]
                pieces.append(steps.prefill_attention(run, kvs[2], batch, None, slopes, scores))
                past += length
            one_by_one = decoded(steps.decode_attention, qkv, kvs[3], slopes, scores)
        assert same(torch.cat(pieces), got)
        for kv in kvs[1:]:
            assert all(map(same, codes(kv, 1), codes(kvs[0], 1)))
            for part, held in zip(kv[6:], kvs[0][6:], strict=True):
                assert same(part[1, :, : LENGTH % RUN], held[1, :, : LENGTH % RUN])
            assert not any(part[0].any() for part in kv)
        size = want.abs().max()
        eps = 4 * torch.finfo(dtype).eps + 1e-5
        assert (got - want).abs().max() <= eps * size
        # Queries and weights are integers of 15 bits.
        assert (one_by_one - want).abs().max() <= (eps + 1e-3) * size


@bits_of
def test_a_row_s_tokens_are_its_own(bits):
    """Whatever stands beside it, and whatever the threads."""
    shape = (8, 2, 64)
    qkv, kv = tokens(shape, torch.bfloat16), empty(bits, shape, torch.bfloat16, rows=4)
    for row, length in enumerate((LENGTH - 1, 3, RUN, RUN - 1)):
        batch = Batch.of([length], "cpu", rows=[row])
        steps.prefill_attention(qkv[:length], kv, batch, None, None)

    def step(rows: list[int]) -> Tensor:
        pasts = [(LENGTH - 1, 3, RUN, RUN - 1)[row] for row in rows]
        copy = QuantizedKV(*(part.clone() for part in kv))
        batch = Batch.of([1] * len(rows), "cpu", rows=rows, pasts=pasts)
        return steps.decode_attention(qkv[rows], copy, batch, None, None)

    want = step([0, 1, 2, 3])
    for threads, rows in itertools.product((1, 2, 3), ([0, 1, 2, 3], [3, 1], [2], [0, 2, 1])):
        torch.set_num_threads(threads)
        assert same(step(rows), want[rows])


@bits_of
def test_what_is_not_finite_stays_with_its_channel_or_token(bits):
    shape = (2, 2, 32)
    qkv, kv = tokens(shape), empty(bits, shape, torch.float32)
    qkv[72, 2 * 32 + 5] = torch.inf  # a key of the first head
    qkv[72, 5 * 32 + 3] = torch.nan  # a value of the second one
    outs = [
        steps.prefill_attention(qkv, kv, Batch.of([LENGTH], "cpu", rows=[1]), None, None),
        decoded(steps.decode_attention, qkv, empty(bits, shape, torch.float32), None),
    ]
    for out in outs:
        bad = out.view(LENGTH, 2, 32).isnan().any(2)
        assert not bad[:72].any() and bad[2 * RUN :].all()


def test_a_large_cache_stands_on_huge_pages():
    """A stream over small pages is read more slowly."""
    kv = QuantizedKV.empty(8, 1, 4, 8192, 64, torch.bfloat16, "cpu")
    large = [part for part in kv if part.nbytes >= library.HUGE_PAGE]
    assert len(large) == 2
    assert not any(part.data_ptr() % library.HUGE_PAGE for part in large)
    assert not any(part.any() for part in kv)
