"""A decode step's attention on a GPU: near the exact one, in any number of programs."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from covering import each, slow_but
from cpu_paths import DTYPES, normal
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import attention, disk_cache, quantized_prefill
from qllm.ops.gpu import device as device_of
from qllm.ops.kv import KV, Batch, Scores, ring_capacity
from qllm.ops.quantized_kv import RUN, QuantizedKV

CAPACITY = 200
POSITIONS = (0, 63, 64, 150, 199)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Four programs to a row, where a cache is small; and several blocks of a short prompt."""
    monkeypatch.setattr(attention, "SPAN", 64)
    monkeypatch.setattr(attention, "BLOCK", 32)
    if not torch.cuda.is_available():  # A GPU is to run what it does outside of tests.
        monkeypatch.setattr(attention, "TILE", (64, 32, 4, 2))
        monkeypatch.setattr(attention, "DESCRIBED_DIMS", (16, 32))


def example(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, rotated: bool, sloped: bool
):
    rows = len(POSITIONS)
    qkv = normal(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    keys, values = normal(2, rows, kv_heads, CAPACITY, dim, dtype=dtype)
    angle = normal(rows, dim // 2).repeat(1, 2)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype)) if rotated else None
    slopes = torch.linspace(0.01, 0.5, heads) if sloped else None
    batch = Batch.of([1] * rows, "cpu", pasts=POSITIONS)
    scores = Scores(sinks=torch.linspace(-1, 4, heads) if rotated else None)
    return qkv, KV(keys, values), batch, angles, slopes, scores


def moved(arguments: tuple, device: str, dtype: torch.dtype | None = None) -> list:
    """Copies on a device; numbers but slopes in another type."""

    def move(part: object) -> object:
        if isinstance(part, tuple):
            return getattr(type(part), "_make", tuple)(map(move, part))
        if not isinstance(part, Tensor):
            return part
        return part.to(device, dtype if part.dtype in DTYPES else None, copy=True)

    return [move(part) for part in arguments]


def error(got: Tensor, exact: Tensor) -> float:
    return (got.cpu().double() - exact).square().mean().sqrt().item()


def assert_near(op: str, arguments: tuple, gpu: str) -> tuple[list, list]:
    """The error of an op is at most twice the reference's in the same type.

    Returns:
        What the op leaves of the arguments, and what the reference leaves of them in float64.
    """
    exact = moved(arguments, "cpu", torch.float64)
    plain, own = moved(arguments, "cpu"), moved(arguments, gpu)
    want, dtype = getattr(reference, op)(*exact), arguments[0].dtype
    allowed = 2 * error(getattr(reference, op)(*plain), want)
    got = getattr(attention, op)(*own)
    assert got.dtype == dtype
    assert error(got, want) <= allowed + torch.finfo(dtype).eps / 4
    return own, exact


ENCODINGS = ((False, False), (True, False), (False, True))  # turned by positions, and sloped


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    slow_but([*each(ENCODINGS, DTYPES), *each(ENCODINGS, DTYPES[1:])], ENCODINGS, DTYPES),
    ids=str,
)
def test_the_error_is_at_most_twice_the_reference_s(encoding, dtype, gpu):
    rotated, sloped = encoding
    first = DTYPES.index(dtype) + 2 * rotated + sloped
    shapes = ((2, 2, 80), (6, 2, 16), (1, 1, 6 if rotated else 5))
    # In the interpreter, which is slow, each type and each encoding meets each shape once.
    for heads, kv_heads, dim in shapes if gpu == "cuda" else (shapes[first % 3],):
        arguments = example(heads, kv_heads, dim, dtype, rotated=rotated, sloped=sloped)
        own, exact = assert_near("decode_attention", arguments, gpu)
        for before, after, want in zip(arguments[1], own[1], exact[1], strict=True):
            # The new key and value have joined them, and nothing else has changed.
            changed = torch.zeros_like(before, dtype=torch.bool)
            changed[torch.arange(len(POSITIONS)), :, arguments[2].positions] = True
            assert torch.equal(after.cpu()[~changed], before[~changed])
            assert error(after, want) <= 2 * torch.finfo(dtype).eps


def test_a_row_is_the_same_whatever_is_beside_it(gpu):
    arguments = example(4, 2, 16, torch.float32, rotated=False, sloped=True)
    whole = attention.decode_attention(*moved(arguments, gpu)).cpu()
    qkv, kv, _, _, slopes, _ = arguments
    for row, position in enumerate(POSITIONS):
        batch = Batch.of([1], "cpu", rows=[row], pasts=[position])
        alone = (qkv[row : row + 1], kv, batch, None, slopes)
        assert torch.equal(
            attention.decode_attention(*moved(alone, gpu)).cpu(), whole[row : row + 1]
        )


def test_counters_are_left_as_they_were(gpu):
    arguments = example(4, 2, 16, torch.float32, rotated=True, sloped=False)
    attention.decode_attention(*moved(arguments, gpu))
    assert not device_of.counters(torch.device(gpu)).any()


@pytest.mark.slow
def test_heads_of_512_channels(gpu):
    how = (2, 1, 512, torch.bfloat16)
    assert_near("decode_attention", example(*how, rotated=True, sloped=False), gpu)
    assert_near("prefill_attention", prompts(*how, rotated=True, sloped=False), gpu)


LENGTHS = (5, 1, 70)
KV_TYPES = (torch.float32, torch.bfloat16)


def prompts(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, rotated: bool, sloped: bool
):
    """Arguments for prompts of these lengths."""
    qkv = normal(sum(LENGTHS), (heads + 2 * kv_heads) * dim, dtype=dtype)
    keys, values = normal(2, len(LENGTHS), kv_heads, CAPACITY, dim, dtype=dtype)
    angle = normal(len(qkv), dim // 2).repeat(1, 2)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype)) if rotated else None
    slopes = torch.linspace(0.01, 0.5, heads) if sloped else None
    return qkv, KV(keys, values), Batch.of(LENGTHS, "cpu"), angles, slopes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_together_are_what_each_is_by_itself(dtype, gpu):
    shapes = {(2, 2, 40): (True, False), (6, 2, 16): (False, True), (1, 1, 5): (False, False)}
    # In the interpreter, which is slow, each shape meets one type.
    chosen = list(shapes.items())
    for shape, (rotated, sloped) in chosen if gpu == "cuda" else [chosen[DTYPES.index(dtype)]]:
        arguments = prompts(*shape, dtype, rotated=rotated, sloped=sloped)
        own, exact = assert_near("prefill_attention", arguments, gpu)
        for before, after, want in zip(arguments[1], own[1], exact[1], strict=True):
            for row, length in enumerate(LENGTHS):  # nothing but the prompts' own tokens changes
                assert torch.equal(after.cpu()[row, :, length:], before[row, :, length:])
            assert error(after, want) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", KV_TYPES, ids=str)
def test_a_prompt_is_the_same_whatever_is_beside_it(dtype, gpu):
    arguments = prompts(4, 2, 16, dtype, rotated=True, sloped=True)
    whole = attention.prefill_attention(*moved(arguments, gpu)).cpu()
    qkv, kv, _, cos_sin, slopes = arguments
    start = sum(LENGTHS[:2])
    for cut in (33, LENGTHS[2]):  # and in whichever runs it comes, and to whichever row
        run = slice(start, start + cut)
        batch = Batch.of([cut], "cpu", rows=[1], pasts=[0])
        got = moved((qkv[run], kv, batch, tuple(part[run] for part in cos_sin), slopes), gpu)
        assert torch.equal(attention.prefill_attention(*got).cpu(), whole[run])
        rest = slice(run.stop, None)
        if left := LENGTHS[2] - cut:
            batch = Batch.of([left], "cpu", rows=[1], pasts=[cut])
            parts = (qkv[rest], batch, tuple(part[rest] for part in cos_sin), slopes)
            new, batch, rotation, slope = moved(parts, gpu)
            got = attention.prefill_attention(new, got[1], batch, rotation, slope)
            assert torch.equal(got.cpu(), whole[rest])


def test_a_full_cache_is_refused(gpu):
    arguments = example(2, 2, 16, torch.float32, rotated=False, sloped=False)
    batch = Batch.of([1, 1], "cpu", pasts=[0, CAPACITY])
    with pytest.raises(IndexError, match=f"{CAPACITY + 1} tokens in a cache for {CAPACITY}"):
        attention.decode_attention(*arguments[:2], batch, None, None)


@pytest.mark.parametrize(
    ("bits", "dtype"),
    slow_but(each((8, 4), KV_TYPES), (8, 4), KV_TYPES),
    ids=str,
)
def test_keys_and_values_of_few_bits(bits, dtype, gpu):
    """The reference's results and integers, where a run becomes whole and behind it."""
    heads, kv_heads, dim = {8: (4, 2, 32), 4: (2, 2, 20)}[bits]
    end = 2 * RUN
    qkv = normal(end + 3, (heads + 2 * kv_heads) * dim, dtype=dtype)
    qkv.view(len(qkv), -1, dim)[:, heads, 3] += 9
    slopes = torch.linspace(0.01, 0.5, heads)
    want, own = (QuantizedKV.empty(bits, 2, kv_heads, 4 * RUN, dim, dtype, "cpu") for _ in range(2))
    for kv in (want, own):
        batch = Batch.of([end - 2], "cpu", rows=[1])
        reference.prefill_attention(qkv[: end - 2], kv, batch, None, slopes)
    own = moved((own,), gpu)[0]
    for place in range(end - 2, end + 3):
        scores = Scores(window=70 if place % 2 else 0)
        batch = Batch.of([1], "cpu", rows=[1], pasts=[place])
        new, slope, there = moved((qkv[place : place + 1], slopes, batch), gpu)
        got = attention.decode_attention(new, own, there, None, slope, scores).cpu()
        expected = reference.decode_attention(
            qkv[place : place + 1], want, batch, None, slopes, scores
        )
        limit = (4 * torch.finfo(dtype).eps + 1e-6) * expected.abs().max()
        assert (got - expected).abs().max() <= limit
    assert torch.equal(own.keys.cpu()[..., : dim // 4, :, :], want.keys[..., : dim // 4, :, :])
    assert torch.equal(own.values.cpu()[..., :dim, :], want.values[..., :dim, :])
    for part, other in zip(own[2:4], want[2:4], strict=True):
        assert torch.equal(part.cpu()[..., :dim], other[..., :dim])
    for part, other in zip(own[4:], want[4:], strict=True):
        assert torch.equal(part.cpu(), other)


@pytest.mark.parametrize(("bits", "dtype"), [*((16, each) for each in KV_TYPES), (8, KV_TYPES[0])])
def test_a_row_with_a_window_in_less_memory(bits, dtype, gpu):
    """Prompts in pieces and steps behind them: the same to the bit, in whichever programs."""
    heads, kv_heads, dim, window = 2, 1, 16, 70
    end = 4 * RUN + 3
    qkv = normal(end, (heads + 2 * kv_heads) * dim, dtype=dtype)
    kind, scores = KV if bits == 16 else QuantizedKV, Scores(window=window)
    ring, whole = (
        moved((kind.empty(bits, 2, kv_heads, capacity, dim, dtype, "cpu"),), gpu)[0]
        for capacity in (ring_capacity(window, 40), 6 * RUN)
    )
    assert ring.capacity == 3 * RUN
    pieces = [*[40] * 6, 14, *[1] * 5]
    for past, length in zip(accumulate(pieces, initial=0), pieces, strict=False):
        attend = attention.decode_attention if length == 1 else attention.prefill_attention
        if past < 200:  # the interpreter is slow
            attend = reference.prefill_attention
        batch = Batch.of([length], "cpu", rows=[1], pasts=[past])
        new, there = moved((qkv[past : past + length], batch), gpu)
        got = [attend(new, kv, there, None, None, scores) for kv in (ring, whole)]
        assert torch.equal(*got)


# Passes over a prompt's tokens whose ends meet those of runs, too, with another prompt beside.
PASSES = ((60,), (4,), (70, 66), (3,))


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float32), (4, torch.bfloat16)], ids=str)
def test_prompts_in_pieces_to_keys_and_values_of_few_bits(bits, dtype, gpu, monkeypatch):
    """The reference's results and integers, whatever is beside a prompt and however it is cut."""
    heads, kv_heads, dim = {8: (2, 2, 20), 4: (2, 1, 32)}[bits]
    rotated, window, cap = bits == 8, 70 * (bits == 8), 30.0 * (bits == 4)
    sinks = torch.linspace(-1, 4, heads) if bits == 8 else None
    scores, slopes = Scores(None, cap, window, sinks), torch.linspace(0.01, 0.5, heads)
    monkeypatch.setattr(quantized_prefill, "unsupported_reason", lambda device: None)
    if bits == 8:  # of one sequence after the other
        monkeypatch.setattr(quantized_prefill, "SCRATCH", 1)
    capacity = ring_capacity(window, max(map(max, PASSES))) if window else 6 * RUN
    want, own = (
        QuantizedKV.empty(bits, 3, kv_heads, capacity, dim, dtype, "cpu") for _ in range(2)
    )
    own, whole = (moved((own,), gpu)[0] for _ in range(2))
    total = [sum(part[i] for part in PASSES if len(part) > i) for i in range(2)]
    every = [normal(count, (heads + 2 * kv_heads) * dim, dtype=dtype) for count in total]
    every[0].view(total[0], -1, dim)[:, heads, 3] += 9  # a channel far from the others
    angle = normal(max(total), dim // 2).repeat(1, 2)
    pasts, found = [0, 0], []
    for lengths in PASSES:
        parts = [slice(past, past + length) for past, length in zip(pasts, lengths, strict=False)]
        qkv = torch.cat([all_of[part] for all_of, part in zip(every, parts, strict=False)])
        angles = torch.cat([angle[part] for part in parts])
        rotation = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotated else None
        rows = [2, 0][: len(lengths)]
        batch = Batch.of(lengths, "cpu", rows=rows, pasts=pasts[: len(lengths)])
        expected = reference.prefill_attention(qkv, want, batch, rotation, slopes, scores)
        given = moved((qkv, batch, rotation, slopes, scores), gpu)
        got = attention.prefill_attention(given[0], own, *given[1:]).cpu()
        limit = (4 * torch.finfo(dtype).eps + 1e-6) * expected.abs().max()
        assert (got - expected).abs().max() <= limit
        found.append(got[: lengths[0]])
        pasts = [past + length for past, length in zip(pasts, [*lengths, 0], strict=False)]
    if not rotated:  # what is turned by positions, the reference rounds at each step
        for part, other in zip(own[:6], want[:6], strict=True):
            assert torch.equal(part.cpu(), other)
    if not window:
        batch = Batch.of(total[:1], "cpu", rows=[2])
        new, slope, there = moved((every[0], slopes, batch), gpu)
        alone = attention.prefill_attention(new, whole, there, None, slope, scores).cpu()
        assert torch.equal(alone, torch.cat(found))
        for part, other in zip(whole[:6], own[:6], strict=True):
            assert torch.equal(part[2], other[2])


def test_the_self_test_of_prompts_finds_what_is_wrong(gpu, monkeypatch, capsys):
    device = torch.device(gpu)
    assert quantized_prefill._self_test(device) is None
    right = quantized_prefill.prefill_attention
    monkeypatch.setattr(quantized_prefill, "prefill_attention", lambda *given: right(*given) + 1)
    monkeypatch.setattr(disk_cache, "test_name", lambda name, device: "gpu-tested")
    monkeypatch.setattr(disk_cache, "read", lambda name: None)  # that it passed before
    monkeypatch.setattr(disk_cache, "write", lambda *given: None)
    quantized_prefill.unsupported_reason.cache_clear()
    self_test = quantized_prefill._self_test
    monkeypatch.setattr(quantized_prefill, "_self_test", lambda _: self_test(device))
    reason = quantized_prefill.unsupported_reason(torch.device("cuda", 7))
    assert reason == "the self-test of attention to keys of 8 bits found other results"
    assert reason in capsys.readouterr().err
    assert attention.about(8, torch.device("cuda", 7)).endswith(reason)


def test_where_descriptors_are_wrong_keys_are_loaded_by_pointers(gpu, monkeypatch, capsys):
    device, never = torch.device(gpu), torch.device("cuda", 7)
    if gpu == "cpu":  # in the interpreter, which is slow
        monkeypatch.setattr(attention, "DESCRIBED_DIMS", (16,))
    assert attention._self_test(device) is None
    right, self_test = attention.plain_prefill_attention, attention._self_test
    monkeypatch.setattr(
        attention, "plain_prefill_attention", lambda *given, **more: right(*given, **more) + 1
    )
    monkeypatch.setattr(disk_cache, "test_name", lambda name, device: "gpu-tested")
    monkeypatch.setattr(disk_cache, "read", lambda name: None)  # that it passed before
    monkeypatch.setattr(disk_cache, "write", lambda *given: None)
    monkeypatch.setattr(device_of, "architecture", lambda device: ("9.0", 4))
    monkeypatch.setattr(attention, "_self_test", lambda _: self_test(device))
    attention.undescribed_reason.cache_clear()
    reason = attention.undescribed_reason(never)
    assert reason == "the self-test of attention by descriptors found other results"
    assert reason in capsys.readouterr().err
    monkeypatch.setattr(device_of, "architecture", lambda device: ("8.0", 4))
    attention.undescribed_reason.cache_clear()
    assert attention.undescribed_reason(never) == "compute capability 8.0 is not among 9, 10"
    attention.undescribed_reason.cache_clear()
