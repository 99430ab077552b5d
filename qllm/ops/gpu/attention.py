"""Attention of a decode step, in one launch, and of prefill, in two."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import decode, quantized_prefill
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.tiles import padded_count, power
from qllm.ops.kv import KV, PLAIN, RUN, Batch, Scores
from qllm.ops.quantized_kv import QuantizedKV, padded_size

SPAN = 256  # tokens of the cache that a program takes
BLOCK = 64  # of them at once
FLOAT_BLOCK = 16  # the same of wide heads in float32, which shared memory holds no more of
WIDE_BLOCK = 32  # the same of heads of more than 256 columns
WARPS, STAGES = 4, 2  # of such a program
JOINED = 4096  # numbers, of several programs, that the last one joins at once


def about(bits: int, device: torch.device) -> str:
    """What else `--explain` says of keys and values of so many bits."""
    reason = quantized_prefill.unsupported_reason(device) if bits < 16 else None
    return f"; prompts in plain torch ops: {reason}" if reason else ""


def decode_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.decode_attention`; a sequence attends to what its own position says.

    What is launched does not depend on `batch.span`, so that it can be captured in a graph.
    """
    from qllm.ops.gpu.kernels import attention

    kv.check(qkv, batch, scores)
    sequences, kv_heads, capacity, dim = len(qkv), kv.kv_heads, kv.capacity, kv.dim
    heads = qkv.shape[1] // dim - 2 * kv_heads
    group, columns = heads // kv_heads, padded_count(dim)
    joined = power(group)
    splits = -(-capacity // SPAN)
    if scores.window:  # which begins anywhere in a span
        splits = min(splits, (scores.window - 2) // SPAN + 2)
    y = qkv.new_empty(sequences, heads * dim)
    partials = counters = None
    if splits > 1:
        assert sequences * kv_heads <= device_of.MAX_TILES
        size = sequences * kv_heads * splits * group * (columns + 2)
        partials = qkv.new_empty(size, dtype=torch.float32)
        counters = device_of.counters(qkv.device)
    cos, sin = (part.contiguous() for part in cos_sin) if cos_sin else (None, None)
    with device_of.current(qkv):
        attention.decode_attention[(sequences, kv_heads, splits)](
            qkv.contiguous(),
            cos,
            sin,
            slopes,
            scores.sinks,
            *_memory(kv),
            batch.rows,
            batch.positions,
            y,
            partials,
            counters,
            heads,
            kv_heads,
            capacity,
            splits,
            scores.factor(dim),
            scores.cap,
            scores.window,
            DIM=dim,
            FIRST=-(-dim // 2),
            COLUMNS=columns,
            GROUP=group,
            PADDED_GROUP=padded_count(group),
            SPAN=SPAN,
            BLOCK=block_of(columns, qkv.dtype),
            SPLIT=splits > 1,
            ROTATE=cos_sin is not None,
            SLOPE=slopes is not None,
            SINK=scores.sinks is not None,
            CAP=scores.cap > 0,
            WINDOW=scores.window > 0,
            BITS=kv.bits,
            WIDTH=padded_size(dim),
            JOINED=joined,
            AT_ONCE=max(1, min(16, JOINED // (joined * columns))),
            num_warps=WARPS,
            num_stages=STAGES,
            **decode.launch_options(qkv.device),
        )
    return y


def block_of(columns: int, dtype: torch.dtype) -> int:
    """Tokens that a program of a decode step takes at once, of heads of so many padded columns."""
    if dtype == torch.float32 and columns > 128:
        return FLOAT_BLOCK
    return BLOCK if columns <= 256 else WIDE_BLOCK


def _memory(kv: KV | QuantizedKV) -> tuple[Tensor | None, ...]:
    """What the kernel of a decode step reads and writes."""
    if isinstance(kv, QuantizedKV):
        codes = (kv.keys, kv.values, kv.key_scales, kv.value_scales, kv.key_zeros, kv.value_zeros)
        return (kv.recent_keys, kv.recent_values, *codes)
    return (kv.keys, kv.values, *[None] * 6)


def prefill_attention(
    qkv: Tensor,
    kv: KV | QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.prefill_attention`, of all sequences at once."""
    if not isinstance(kv, QuantizedKV):
        return plain_prefill_attention(qkv, kv, batch, cos_sin, slopes, scores)
    if quantized_prefill.unsupported_reason(qkv.device):
        return reference.prefill_attention(qkv, kv, batch, cos_sin, slopes, scores)
    return quantized_prefill.prefill_attention(qkv, kv, batch, cos_sin, slopes, scores)


def plain_prefill_attention(
    qkv: Tensor,
    kv: KV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
    described: bool | None = None,
) -> Tensor:
    """The same to keys and values as they are; `described` as `attend` has it."""
    from qllm.ops.gpu.kernels import prefill

    kv.check(qkv, batch, scores)
    qkv, cache, kv_heads, dim = qkv.contiguous(), (kv.keys, kv.values), kv.kv_heads, kv.dim
    heads = qkv.shape[1] // dim - 2 * kv_heads
    rotation = [part.contiguous() for part in cos_sin] if cos_sin else [None, None]
    with device_of.current(qkv):
        prefill.write_tokens[(batch.max_tokens, len(batch.rows))](
            qkv, *rotation, batch.rows, batch.starts, batch.positions, *cache, heads, kv_heads,
            kv.capacity,
            DIM=dim, FIRST=-(-dim // 2), WIDTH=power(dim), KV_HEADS=power(kv_heads),
            ROTATE=cos_sin is not None,
            num_warps=max(1, min(8, power(dim) * power(kv_heads) // 512)),
        )  # fmt: skip
    y = qkv.new_empty(len(qkv), heads * dim)
    attend(qkv, rotation, cache, batch, slopes, scores, y, described=described)
    return batch.select(y)


def attend(
    qkv: Tensor,
    rotation: Sequence[Tensor | None],
    cache: tuple[Tensor, ...],
    batch: Batch,
    slopes: Tensor | None,
    scores: Scores,
    y: Tensor,
    *,
    own: tuple[Tensor, ...] | None = None,
    part: tuple[int, int] | None = None,
    described: bool | None = None,
) -> None:
    """Attention of new tokens to keys and values in 16 bits, or as wide as activations are.

    Args:
        rotation: cosines and sines by which queries are rotated.
        cache: keys and values of rows, or with `own` of the sequences of the part.
        own: (H_kv, slots, D), keys and values that a token sees of its own run in place of those.
        part: the first sequence and how many; None: all.
        described: keys and values are loaded by descriptors; None: where they can be.
    """
    from qllm.ops.gpu.kernels import prefill

    (_, kv_heads, capacity, dim), runs = cache[0].shape, own is not None
    heads, (first, count) = y.shape[1] // dim, part or (0, len(batch.rows))
    described = can_describe(cache[0]) if described is None else described
    tile = prefill_tile(dim, qkv.dtype, described, runs=runs)
    width, tokens, keys_at_once, warps, stages = tile
    if runs or scores.window:
        keys_at_once = min(keys_at_once, RUN)
    blocks = (batch.max_tokens + tokens - 2) // tokens + 1
    sources, slots = [*cache, *(own or (None, None))], own[0].shape[1] if own else 0
    if described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        block = [keys_at_once, width]
        sources = [
            None if source is None else TensorDescriptor.from_tensor(source.view(-1, dim), block)
            for source in sources
        ]
    with device_of.current(qkv):
        prefill.prefill_attention[(heads, count, blocks)](
            qkv, *rotation, *sources, slopes, scores.sinks, batch.rows, batch.starts,
            batch.positions, y, heads, kv_heads, capacity, slots, first, scores.factor(dim),
            scores.cap, scores.window,
            DIM=dim, FIRST=-(-dim // 2), WIDTH=width, GROUP=heads // kv_heads, BM=tokens,
            BN=keys_at_once, ROTATE=rotation[0] is not None, SLOPE=slopes is not None,
            SINK=scores.sinks is not None, CAP=scores.cap > 0, WINDOW=scores.window > 0,
            RUNS=runs, DESCRIBED=described,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


# Major compute capabilities with descriptors (TMA), and the shared memory for what they load; and
# sizes of heads of which they load whole rows, and for which there are registers.
DESCRIBING, DESCRIBED_DIMS = ("9", "10"), (64, 128)


def can_describe(keys: Tensor) -> bool:
    """Whether such keys, and their values, are loaded by descriptors, which take no registers."""
    fits = keys.shape[-1] in DESCRIBED_DIMS and keys.element_size() == 2
    rows_fit = keys.numel() < 1 << 31  # An int32 counts them.
    return fits and rows_fit and undescribed_reason(keys.device) is None


@device_of.once
def undescribed_reason(device: torch.device) -> str | None:
    """Why keys and values are loaded by pointers on a device; None: they are by descriptors.

    Where a self-test of those fails a note says so once.
    """
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "this Triton has no tensor descriptors"
    if device.type != "cuda":
        return None
    architecture, _ = device_of.architecture(device)
    if architecture.partition(".")[0] not in DESCRIBING:
        return f"compute capability {architecture} is not among {', '.join(DESCRIBING)}"
    instead = "prompts' attention loads keys by pointers, which takes longer"
    test = partial(_self_test, device)
    return device_of.failure("described attention", device, test, instead)


# Of tokens that are loaded by descriptors, and by pointers, which take registers: of heads of up to
# 128 columns, tokens and keys that a program takes at once, warps and stages.
TILE, TILE_OF_POINTERS = (64, 64, 4, 2), (64, 64, 8, 2)
# The same in float32, which no matrix unit multiplies, by the columns up to which one serves: each
# thread has all columns of what it multiplies in registers. And to runs, whose tokens are as many.
FLOAT_TILES = {64: (32, 32, 4, 2), 128: (32, 16, 8, 2), 256: (16, 16, 8, 2)}
FLOAT_TILE_OF_RUNS = (RUN, 16, 16, 2)


def prefill_tile(
    dim: int, dtype: torch.dtype, described: bool, *, runs: bool = False
) -> tuple[int, int, int, int, int]:
    """Padded columns of a head, tokens and keys that a program takes at once, warps and stages."""
    width = padded_count(dim)
    if dtype == torch.float32:
        if runs:
            return width, *FLOAT_TILE_OF_RUNS
        largest = max(FLOAT_TILES)
        return width, *FLOAT_TILES[next((n for n in FLOAT_TILES if width <= n), largest)]
    tile = TILE if described else TILE_OF_POINTERS
    if width > 128:
        tile = (64, 32, 8, 2) if width <= 256 else (32, 16, 8, 2)
    return width, RUN if runs else tile[0], *tile[1:]


def _self_test(device: torch.device) -> str | None:
    """Prompts beside the reference's results, and in two pieces, which are to find the same."""
    heads, kv_heads, dtype, lengths = 4, 2, torch.bfloat16, (200, 30)
    slopes = torch.linspace(0.01, 0.2, heads)
    for dim in DESCRIBED_DIMS:
        width = (heads + 2 * kv_heads) * dim
        qkv = (torch.arange(sum(lengths) * width) * 2654435761 % 65536).view(-1, width)
        qkv = qkv.sub(32768).div(16384).to(dtype)
        plain, whole, cut = (
            KV.empty(16, 2, kv_heads, 256, dim, dtype, place) for place in ("cpu", device, device)
        )
        batch = Batch.of(lengths, "cpu")
        want = reference.prefill_attention(qkv, plain, batch, None, slopes)
        found = []
        for kv, counts, past in ((whole, lengths, 0), (cut, (130,), 0), (cut, (70,), 130)):
            there = Batch.of(counts, device, pasts=[past, 0][: len(counts)])
            new = qkv[past : past + sum(counts)].to(device)
            how = (there, None, slopes.to(device))
            found.append(plain_prefill_attention(new, kv, *how, described=True).cpu())
        if not torch.allclose(found[0].float(), want.float(), atol=0.05, rtol=0.05):
            return "the self-test of attention by descriptors found other results"
        if not torch.equal(torch.cat(found[1:]), found[0][: lengths[0]]):
            return "a prompt in pieces found other results in the self-test of attention"
    return None
