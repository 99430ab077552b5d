"""A decode step's attention on a GPU: near the exact one, in any number of programs."""

from __future__ import annotations

import pytest
import torch
from cpu_paths import DTYPES, normal
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import attention
from qllm.ops.gpu import device as device_of

CAPACITY = 200
POSITIONS = (0, 63, 64, 150, 199)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Four programs to a row, where a cache is small."""
    monkeypatch.setattr(attention, "SPAN", 64)
    monkeypatch.setattr(attention, "BLOCK", 32)


def example(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, turned: bool, sloped: bool):
    rows = len(POSITIONS)
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    keys, values = normal(2, rows, kv_heads, CAPACITY, dim, dtype=dtype)
    angle = normal(rows, dim // 2).repeat(1, 2)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype)) if turned else None
    slopes = torch.linspace(0.01, 0.5, heads) if sloped else None
    return qkv, keys, values, torch.tensor(POSITIONS), max(POSITIONS) + 1, angles, slopes


def moved(arguments: tuple, device: str, dtype: torch.dtype | None = None) -> list:
    """Copies on a device; numbers but slopes in another type."""

    def move(part: object) -> object:
        if isinstance(part, tuple):
            return tuple(map(move, part))
        if not isinstance(part, Tensor):
            return part
        return part.to(device, dtype if part.dtype in DTYPES else None, copy=True)

    return [move(part) for part in arguments]


def error(got: Tensor, exact: Tensor) -> float:
    return (got.cpu().double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("turned", "sloped"), [(False, False), (True, False), (False, True)])
def test_the_error_is_at_most_twice_the_reference_s(dtype, turned, sloped, gpu):
    first = DTYPES.index(dtype) + 2 * turned + sloped
    shapes = ((2, 2, 80), (6, 2, 16), (1, 1, 6 if turned else 5))
    # In the interpreter, which is slow, each type and each encoding meets each shape once.
    for heads, kv_heads, dim in shapes if gpu == "cuda" else (shapes[first % 3],):
        arguments = example(heads, kv_heads, dim, dtype, turned=turned, sloped=sloped)
        exact = moved(arguments, "cpu", torch.float64)
        plain, own = moved(arguments, "cpu"), moved(arguments, gpu)
        want = reference.decode_attention(*exact)
        allowed = 2 * error(reference.decode_attention(*plain), want)
        got = attention.decode_attention(*own)
        assert got.dtype == dtype
        assert error(got, want) <= allowed + torch.finfo(dtype).eps / 4
        for cache in (1, 2):  # the new key and value have joined them, and nothing else has changed
            before, after = arguments[cache], own[cache].cpu()
            changed = torch.zeros_like(before, dtype=torch.bool)
            changed[torch.arange(len(POSITIONS)), :, arguments[3]] = True
            assert torch.equal(after[~changed], before[~changed])
            assert error(after, exact[cache]) <= 2 * torch.finfo(dtype).eps


def test_a_row_is_the_same_whatever_is_beside_it(gpu):
    arguments = example(4, 2, 16, torch.float32, turned=False, sloped=True)
    whole = attention.decode_attention(*moved(arguments, gpu)).cpu()
    qkv, keys, values, positions, _, _, slopes = arguments
    for row, position in enumerate(POSITIONS):
        one = slice(row, row + 1)
        alone = (qkv[one], keys[one], values[one], positions[one], position + 1, None, slopes)
        assert torch.equal(attention.decode_attention(*moved(alone, gpu)).cpu(), whole[one])


def test_counters_are_left_as_they_were(gpu):
    arguments = example(4, 2, 16, torch.float32, turned=True, sloped=False)
    attention.decode_attention(*moved(arguments, gpu))
    assert not device_of.counters(torch.device(gpu)).any()


LENGTHS = (5, 1, 70)


def prompts(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, turned: bool, sloped: bool):
    """qkv, keys, values, angles and slopes of prompts of these lengths."""
    qkv = normal(sum(LENGTHS), (heads + 2 * kv_heads) * dim, dtype=dtype)
    keys, values = normal(2, len(LENGTHS), kv_heads, CAPACITY, dim, dtype=dtype)
    angle = normal(len(qkv), dim // 2).repeat(1, 2)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype)) if turned else None
    return qkv, keys, values, angles, torch.linspace(0.01, 0.5, heads) if sloped else None


def together(lengths: tuple[int, ...], qkv, keys, values, angles, slopes) -> Tensor:
    """What is computed at once."""
    counts = torch.tensor([0, *lengths])
    rows = torch.arange(len(lengths)).repeat_interleave(counts[1:])
    positions = torch.cat([torch.arange(n) for n in lengths])
    place = (rows, positions, counts.cumsum(0).int())
    place = (part.to(qkv.device) for part in place)
    options = (*place, max(lengths), angles, slopes)
    return attention.prompts_attention(qkv, keys, values, *options)


def one_by_one(qkv, keys, values, angles, slopes) -> Tensor:
    """The reference of each prompt."""
    parts = zip(*(part.split(LENGTHS) for part in angles), strict=True) if angles else [None] * 3
    return torch.cat(
        [
            reference.prompt_attention(part, *cache, turns, slopes)
            for part, turns, *cache in zip(qkv.split(LENGTHS), parts, keys, values, strict=True)
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_together_are_what_each_is_by_itself(dtype, gpu):
    shapes = {(2, 2, 40): (True, False), (6, 2, 16): (False, True), (1, 1, 5): (False, False)}
    for shape, (turned, sloped) in shapes.items():
        arguments = prompts(*shape, dtype, turned=turned, sloped=sloped)
        exact = moved(arguments, "cpu", torch.float64)
        plain, own = moved(arguments, "cpu"), moved(arguments, gpu)
        want = one_by_one(*exact)
        allowed = 2 * error(one_by_one(*plain), want)
        got = together(LENGTHS, *own)
        assert got.dtype == dtype
        assert error(got, want) <= allowed + torch.finfo(dtype).eps / 4
        for cache in (1, 2):  # nothing but the prompts' own tokens has changed
            before, after = arguments[cache], own[cache].cpu()
            for row, length in enumerate(LENGTHS):
                assert torch.equal(after[row, :, length:], before[row, :, length:])
            assert error(after, exact[cache]) <= 2 * torch.finfo(dtype).eps


def test_a_prompt_is_the_same_whatever_is_beside_it(gpu):
    arguments = prompts(4, 2, 16, torch.float32, turned=True, sloped=True)
    whole = together(LENGTHS, *moved(arguments, gpu)).cpu()
    qkv, keys, values, (cos, sin), slopes = arguments
    last = slice(sum(LENGTHS[:2]), None)
    alone = (qkv[last], keys[2:], values[2:], (cos[last], sin[last]), slopes)
    assert torch.equal(together(LENGTHS[2:], *moved(alone, gpu)).cpu(), whole[last])


def test_a_full_cache_is_refused(gpu):
    arguments = example(2, 2, 16, torch.float32, turned=False, sloped=False)
    with pytest.raises(IndexError, match=f"{CAPACITY + 1} tokens in a cache for {CAPACITY}"):
        attention.decode_attention(*arguments[:4], CAPACITY + 1, None, None)
