"""Attention to the cache, and of a prompt to itself, on every path of this machine."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import exact
import numpy as np
import pytest
import torch
from covering import each, slow_but
from cpu_paths import DTYPES, bits_of, everywhere, normal, on, same
from exact import assert_rounded_once
from torch import Tensor

from qllm.ops import reference
from qllm.ops.cpu import library as native
from qllm.ops.cpu import steps
from qllm.ops.kv import KV, Batch, Scores

pytestmark = pytest.mark.usefixtures("one_thread", "path")

HEADS = ((1, 1), (4, 2), (6, 2), (8, 1))
DIMS = (1, 2, 16, 20, 64, 80, 96, 128)
# Tokens, around the edges of tiles and of what a thread takes.
EDGES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 36, 63, 64, 65, 70)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=native.PATHS)
def path(request):
    with on(request.param):
        yield request.param


@dataclass(frozen=True)
class Tokens:
    """New tokens (N, heads of queries, keys and values), their places, and what turns them.

    Attributes:
        shape: (heads, key-value heads, dim).
    """

    shape: tuple[int, int, int]
    qkv: Tensor
    positions: Tensor
    angles: tuple[Tensor, Tensor] | None
    slopes: Tensor | None

    @property
    def scores(self) -> Scores:
        """Those of heads that are turned have sinks, some of which are above all scores."""
        sinks = torch.linspace(-1, 5, self.shape[0]) if self.angles else None
        return Scores(sinks=sinks)

    def at(self, rows: list[int] | slice) -> Tokens:
        angles = self.angles and tuple(part[rows] for part in self.angles)
        return replace(self, qkv=self.qkv[rows], positions=self.positions[rows], angles=angles)

    def heads(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries and keys, rotated, and values: float64 (N, H, D) and twice (N, H_kv, D)."""
        heads, kv_heads, dim = self.shape
        parts = exact.numpy(self.qkv).reshape(len(self.qkv), -1, dim)
        q, k, v = np.split(parts, [heads, heads + kv_heads], axis=1)
        return exact.rotate(q, self.angles), exact.rotate(k, self.angles), v


def tokens_at(
    positions: list[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    rotated: bool = False,
    sloped: bool = False,
) -> Tokens:
    heads, kv_heads, dim = shape
    rows = len(positions)
    angles = None
    if rotated and dim % 2 == 0:
        angle = normal(rows, dim // 2, seed=1).repeat(1, 2) * 9
        angles = angle.cos().to(dtype), angle.sin().to(dtype)
    slopes = torch.linspace(0.01, 0.5, heads) if sloped else None
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    return Tokens(shape, qkv, torch.tensor(positions), angles, slopes)


def full_cache(tokens: Tokens, capacity: int, *, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values ([rows,] H_kv, capacity, D), NaN where no token has come yet."""
    _, kv_heads, dim = tokens.shape
    shape = (kv_heads, capacity, dim)
    if rows is None:
        keys, values = torch.full((2, *shape), math.nan).to(tokens.qkv.dtype)
        return keys, values
    keys, values = normal(2, rows, *shape, dtype=tokens.qkv.dtype, seed=2)
    for row, position in enumerate(tokens.positions.tolist()):
        keys[row, :, position:] = values[row, :, position:] = math.nan
    return keys, values


def decode(tokens: Tokens, keys: Tensor, values: Tensor, run=steps.decode_attention) -> Tensor:
    pasts = tokens.positions.tolist()
    batch = Batch.of([1] * len(pasts), "cpu", pasts=pasts)
    cache = KV(keys, values)
    return run(tokens.qkv, cache, batch, tokens.angles, tokens.slopes, tokens.scores)


def prompt(tokens: Tokens, keys: Tensor, values: Tensor, run=steps.prefill_attention) -> Tensor:
    """A run of tokens of one row, which may hold others already."""
    batch = Batch.of([len(tokens.qkv)], "cpu", pasts=[int(tokens.positions[0])])
    kv = KV(keys[None], values[None])
    return run(tokens.qkv, kv, batch, tokens.angles, tokens.slopes, tokens.scores)


def assert_written(cache: Tensor, before: Tensor, places: list, heads: np.ndarray) -> None:
    """Heads (N, H_kv, D) of tokens are at their places, and nothing is different elsewhere."""
    rest = torch.ones(cache.shape, dtype=torch.bool)
    for place, head in zip(places, heads, strict=True):
        assert_rounded_once(cache[place], head, np.abs(heads).max())
        rest[place] = False
    assert torch.equal(bits_of(cache)[rest], bits_of(before)[rest])


def assert_attention(
    tokens: Tokens, got: Tensor, other: Tensor, seen: list[tuple[Tensor, Tensor]]
) -> None:
    """The kernel's result is that of float64, and not twice as far from it as the reference's.

    Args:
        other: the reference's.
        seen: keys and values (H_kv, S, D) for each token, its own the last.
    """
    queries, *_ = tokens.heads()
    slopes = None if tokens.slopes is None else exact.numpy(tokens.slopes)
    results = [
        exact.attention(query, *map(exact.numpy, cache), slopes, tokens.scores)
        for query, cache in zip(queries, seen, strict=True)
    ]
    want, size = (np.stack(part) for part in zip(*results, strict=True))
    assert_rounded_once(got.view(want.shape), want, size)
    error, allowed = (np.abs(exact.numpy(part.view(want.shape)) - want) for part in (got, other))
    few_ulps = exact.ULPS * torch.finfo(got.dtype).eps
    assert error.max() <= 2 * allowed.max() + few_ulps * np.abs(want).max()


def check_decode(tokens: Tokens, capacity: int) -> None:
    cache = full_cache(tokens, capacity, rows=len(tokens.qkv))
    after = [part.clone() for part in cache]
    got = decode(tokens, *after)
    places = [(row, slice(None), p) for row, p in enumerate(tokens.positions.tolist())]
    for part, before, heads in zip(after, cache, tokens.heads()[1:], strict=True):
        assert_written(part, before, places, heads)
    # Zeros, as in a cache that is new: the reference reads all of it.
    other = decode(tokens, *(part.nan_to_num() for part in cache), reference.decode_attention)
    seen = [(after[0][row, :, : p + 1], after[1][row, :, : p + 1]) for row, _, p in places]
    assert_attention(tokens, got, other, seen)


def check_prompt(tokens: Tokens, capacity: int) -> None:
    cache = full_cache(tokens, capacity)
    after = [part.clone() for part in cache]
    got = prompt(tokens, *after)
    places = [(slice(None), place) for place in range(len(tokens.qkv))]
    for part, before, heads in zip(after, cache, tokens.heads()[1:], strict=True):
        assert_written(part, before, places, heads)
    other = prompt(tokens, *(part.clone() for part in cache), reference.prefill_attention)
    seen = [(after[0][:, : i + 1], after[1][:, : i + 1]) for i in range(len(tokens.qkv))]
    assert_attention(tokens, got, other, seen)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    ("dim", "dtype"),
    # Every type has a vector and a bit more: 20.
    slow_but([*each(DIMS, DTYPES), *itertools.product((20,), DTYPES)], DIMS, DTYPES),
    ids=str,
)
def test_attention_of_all_shapes(dim, dtype):
    places = itertools.cycle(EDGES)
    for i, heads in enumerate(HEADS):
        for rotated, sloped in ((i % 2 == 0, i % 3 == 0), (i % 2 == 1, i % 3 == 1)):
            positions = [next(places) - 1 for _ in range(3)]
            tokens = tokens_at(positions, (*heads, dim), dtype, rotated=rotated, sloped=sloped)
            check_decode(tokens, max(positions) + 1 + i % 2 * 3)
            length = next(places)
            tokens = tokens_at(
                [*range(length)], (*heads, dim), dtype, rotated=rotated, sloped=sloped
            )
            check_prompt(tokens, length + i % 2 * 3)


@pytest.mark.parametrize("rotated", [True, False])
def test_attention_of_all_lengths(rotated):
    tokens = tokens_at([*range(70)], (4, 2, 20), rotated=rotated, sloped=not rotated)
    check_decode(tokens, 70)
    for length in range(2 - rotated, 71, 2):  # the others are those of the other case
        check_prompt(tokens.at(slice(length)), 70)


def test_attention_to_many_tokens():
    tokens = tokens_at([1500, 0, 1499], (2, 1, 32), rotated=True, sloped=True)
    check_decode(tokens, 1501)
    tokens = tokens_at([*range(600)], (2, 1, 32), rotated=True, sloped=True)
    check_prompt(tokens, 600)


@pytest.mark.parametrize("scale", [30.0, 87.0, 500.0])
def test_weights_of_a_softmax(scale):
    """To 1e-6 of themselves; those below e^-87 vanish. Scores and values are exact here."""
    random = np.random.default_rng(0)
    for length in (1, 5, 37, 64):
        scores = (random.uniform(-scale, 0, length) * 1024).round() / 1024
        want = np.exp(scores - scores.max())
        want /= want.sum()
        # Scores are q k / 8; the values are such that the result is the weights.
        qkv, keys = torch.zeros(length, 3, 64), torch.zeros(1, length, 64)
        keys[0, :, 0] = torch.from_numpy(scores)
        qkv[:, 0, 0], qkv[:, 1], qkv[:, 2] = 8, keys[0], torch.eye(64)[:length]
        everything = prompt_of(qkv.flatten(1))
        values = torch.eye(64)[None, None, :length].clone()
        batch = Batch.of([1], "cpu", pasts=[length - 1])
        new, kv = qkv[-1:].flatten(1), KV(keys[None], values)
        got = steps.decode_attention(new, kv, batch, None, None)
        for weights in map(exact.numpy, (got[0], everything[-1])):
            assert not weights[length:].any()
            assert (np.abs(weights[:length] - want) <= 1e-6 * want + 2e-38).all()


def prompt_of(qkv: Tensor) -> Tensor:
    """Attention of a prompt with one head of 64."""
    kv = KV(*torch.zeros(2, 1, 1, len(qkv), 64))
    return steps.prefill_attention(qkv, kv, Batch.of([len(qkv)], "cpu"), None, None)


@pytest.mark.parametrize("largest", [1e4, 1e20, 3e38])
def test_scores_of_any_size(largest):
    """The largest score takes all the weight, without an overflow on the way there."""
    values = normal(9, 64)
    for sign, best in ((1, 8), (-1, 0)):
        qkv = torch.zeros(9, 3, 64)
        qkv[:, 0, 0], qkv[:, 1, 0] = 1, torch.linspace(-1, 1, 9) * sign * largest
        qkv[:, 2] = values
        assert same(prompt_of(qkv.flatten(1))[-1], values[best])


@dtypes
def test_a_row_is_its_own(dtype):
    """Whatever stands beside it, and whatever the threads."""
    positions = [0, 69, 3, 31, 32, 64, 5, 69, 17]
    tokens = tokens_at(positions, (8, 2, 64), dtype, rotated=True, sloped=True)
    cache = full_cache(tokens, 70, rows=9)

    def run(rows: list[int]) -> Tensor:
        return decode(tokens.at(rows), *(part[rows] for part in cache))

    together = run([*range(9)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in ([*range(9)], [*range(9)][::-1], *([i] for i in range(9)), [1, 1, 4]):
            assert same(run(rows), together[rows])


@dtypes
def test_a_prompt_s_token_sees_nothing_behind_it(dtype):
    """Nor does its result depend on how much comes there, or on the threads."""
    tokens = tokens_at([*range(70)], (6, 2, 20), dtype, rotated=True, sloped=True)
    whole = prompt(tokens, *full_cache(tokens, 70))
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        assert same(prompt(tokens, *full_cache(tokens, 80)), whole)
        for length in EDGES:
            start = tokens.at(slice(length))
            assert same(prompt(start, *full_cache(start, 70)), whole[:length])
    changed = replace(tokens, qkv=tokens.qkv.clone())
    changed.qkv[33:] *= -7
    assert same(prompt(changed, *full_cache(tokens, 70))[:33], whole[:33])


@dtypes
def test_a_prompt_may_come_in_runs(dtype):
    """Wherever it is cut, and in whichever row of a cache, beside others, it comes."""
    tokens = tokens_at([*range(70)], (6, 2, 20), dtype, rotated=True, sloped=True)
    cache = full_cache(tokens, 70)
    whole = prompt(tokens, *cache)
    for cuts in ([0, 33, 70], [0, 1, 64, 69, 70], [0, 2, 3, 37, 38, 70]):
        kv = KV(*torch.full((2, 5, 2, 70, 20), math.nan, dtype=dtype))
        for start, end in itertools.pairwise(cuts):
            run, other = tokens.at(slice(start, end)), tokens.at(slice(end - start))
            batch = Batch.of([end - start] * 2, "cpu", rows=[3, 1], pasts=[start, 0])
            both = torch.cat([run.qkv, other.qkv])
            angles = tuple(map(torch.cat, zip(run.angles, other.angles, strict=True)))
            got = steps.prefill_attention(both, kv, batch, angles, tokens.slopes, tokens.scores)
            assert same(got[: end - start], whole[start:end])
            assert same(got[end - start :], whole[: end - start])
        assert all(same(part[3], want) for part, want in zip(kv, cache, strict=True))
        assert all(part[[0, 2, 4]].isnan().all() for part in kv)


@dtypes
def test_memory_that_is_shared_is_bounded(dtype):
    """A few heads at a time where the keys of all would be too large: here 20 MB to a head."""
    tokens = tokens_at([*range(3)], (4, 4, 20), dtype)
    past = 40_000
    kv = KV(*normal(2, 1, 4, past + 3, 20, dtype=dtype))
    batch = Batch.of([3], "cpu", pasts=[past])
    got = steps.prefill_attention(tokens.qkv, kv, batch, None, None)
    parts = tokens.qkv.view(3, 12, 20)
    for head in range(4):
        alone = KV(*(part[:, head : head + 1].contiguous() for part in kv))
        qkv = parts[:, [head, 4 + head, 8 + head]].flatten(1)
        want = steps.prefill_attention(qkv, alone, batch, None, None)
        assert same(got.view(3, 4, 20)[:, head], want)


@dtypes
def test_a_prompt_s_last_token_is_one_that_is_decoded(dtype):
    for length, dim in itertools.product((1, 4, 33, 70), (16, 20, 128)):
        tokens = tokens_at([*range(length)], (6, 2, dim), dtype, rotated=True, sloped=True)
        cache = full_cache(tokens, 70)
        whole = prompt(tokens, *cache)
        last = tokens.at([-1])
        before = [part[None].clone() for part in cache]
        for part in before:
            part[:, :, length - 1] = math.nan
        got = decode(last, *before)
        for a, b in zip(before, cache, strict=True):
            assert torch.equal(bits_of(a[0]), bits_of(b))
        eps = torch.finfo(dtype).eps
        assert torch.allclose(got, whole[-1:], rtol=2 * eps, atol=8 * eps)


@dtypes
def test_the_cache_is_the_same_on_every_path(dtype):
    tokens = tokens_at([*range(33)], (6, 2, 20), dtype, rotated=True)

    def written() -> Tensor:
        cache = [part.nan_to_num() for part in full_cache(tokens, 40)]
        prompt(tokens, *cache)
        return torch.stack(cache)

    everywhere(written)


def test_what_is_no_number_stays_in_its_row():
    tokens = tokens_at([9, 4, 20], (4, 2, 20), rotated=True)
    cache = full_cache(tokens, 30, rows=3)
    clean = decode(tokens, *(part.clone() for part in cache))
    for broken in (math.nan, math.inf):
        tokens.qkv[1, 3] = broken
        got = decode(tokens, *(part.clone() for part in cache))
        assert same(got[[0, 2]], clean[[0, 2]])
        # The first head's query, and none of the others'.
        assert got[1, :20].isnan().all() and same(got[1, 20:], clean[1, 20:])


@dtypes
def test_tensors_need_not_be_contiguous(dtype):
    tokens = tokens_at([3, 9, 0, 7], (4, 2, 16), dtype, rotated=True, sloped=True)
    apart = replace(
        tokens,
        qkv=tokens.qkv.t().contiguous().t(),
        positions=tokens.positions.repeat_interleave(2)[::2],
        angles=tuple(part.t().contiguous().t() for part in tokens.angles),
    )
    rows = full_cache(tokens, 10, rows=4)
    assert same(*(decode(t, *(part.clone() for part in rows)) for t in (tokens, apart)))
    assert same(*(prompt(t, *full_cache(t, 10)) for t in (tokens, apart)))


def test_a_cache_that_is_full_is_not_written_beyond():
    tokens = tokens_at([3, 10], (4, 2, 16))
    keys, values = full_cache(tokens, 10, rows=2)
    with pytest.raises(IndexError, match="11 tokens in a cache for 10"):
        decode(tokens, keys, values)
    tokens = tokens_at([*range(11)], (4, 2, 16))
    with pytest.raises(IndexError, match="11 tokens in a cache for 10"):
        prompt(tokens, *full_cache(tokens, 10))
