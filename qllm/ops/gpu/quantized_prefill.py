"""Attention of prefill to keys and values of 8 and 4 bits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu.tiles import padded_count, power
from qllm.ops.kv import PLAIN, RUN, Batch, Scores, ring_capacity
from qllm.ops.quantized_kv import QuantizedKV, padded_size

# Keys and values of so many numbers are made of integers at once, or those of one sequence.
SCRATCH = 1 << 26


@device_of.once
def unsupported_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None where they can.

    Where a GPU finds something else than the reference, a note says so once.
    """
    if device.type != "cuda":
        return None
    instead = "prompts' attention to a KV cache of 8 or 4 bits runs in plain torch ops, slowly"
    return device_of.failure("quantized_prefill", device, partial(_self_test, device), instead)


def prefill_attention(
    qkv: Tensor,
    kv: QuantizedKV,
    batch: Batch,
    cos_sin: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scores: Scores = PLAIN,
) -> Tensor:
    """`reference.prefill_attention`, of all sequences at once."""
    from qllm.ops.gpu import attention
    from qllm.ops.gpu.kernels import quantized_prefill as kernels

    kv.check(qkv, batch, scores)
    kv_heads, capacity, dim, sequences = kv.kv_heads, kv.capacity, kv.dim, len(batch.rows)
    qkv, heads = qkv.contiguous(), qkv.shape[1] // dim - 2 * kv_heads
    slots, size, columns = len(qkv) + sequences * RUN, padded_size(dim), padded_count(dim)
    own = qkv.new_empty(2, kv_heads, slots, dim).unbind()
    length = -(-batch.span // RUN) * RUN  # of what tokens see as integers, and have as numbers
    if scores.window:
        length = min(length, ring_capacity(scores.window, batch.max_tokens))
    at_once = max(1, min(sequences, SCRATCH // (2 * kv_heads * length * dim)))
    cache = qkv.new_empty(2, at_once, kv_heads, length, dim).unbind()
    y = qkv.new_empty(len(qkv), heads * dim)
    rotation = [part.contiguous() for part in cos_sin] if cos_sin else [None, None]
    index = (batch.rows, batch.starts, batch.positions)
    recent = (kv.recent_keys, kv.recent_values)
    codes = (kv.keys, kv.values, kv.key_scales, kv.value_scales, kv.key_zeros, kv.value_zeros)
    words = (kv.keys.view(torch.int32), kv.values.view(torch.int32))
    max_tokens = batch.max_tokens + RUN - 1  # with those before them in the same run
    with device_of.current(qkv):
        kernels.write_runs[(max_tokens, sequences)](
            qkv, *rotation, *index, *recent, *own, heads, kv_heads, slots,
            DIM=dim, FIRST=-(-dim // 2), COLUMNS=power(dim), KV_HEADS=power(kv_heads),
            ROTATE=cos_sin is not None,
            num_warps=max(1, min(8, power(dim) * power(kv_heads) // 512)),
            enable_fp_fusion=False,  # what is quantized is the reference's, in float32
        )  # fmt: skip
        kernels.quantize_runs[(-(-max_tokens // RUN), kv_heads, sequences)](
            *own, *index, *recent, *codes, kv_heads, slots, capacity,
            DIM=dim, CHANNELS=power(dim), WIDTH=size, BITS=kv.bits, num_warps=4,
            enable_fp_fusion=False,  # integers are the reference's
        )  # fmt: skip
        for first in range(0, sequences, at_once):
            count = min(at_once, sequences - first)
            kernels.dequantize_runs[(length // RUN, kv_heads, count)](
                *words, *codes[2:], *index, *cache, kv_heads, capacity, length, first,
                scores.window,
                DIM=dim, COLUMNS=columns, WIDTH=size, BITS=kv.bits, WINDOW=scores.window > 0,
                num_warps=4,
            )  # fmt: skip
            attention.attend(
                qkv, rotation, cache, batch, slopes, scores, y, own=own, part=(first, count)
            )
    return batch.select(y)


def _self_test(device: torch.device) -> str | None:
    """Two prompts, one of them in two pieces, beside the reference's results and integers.

    The reference runs on the CPU: on a GPU, torch divides by a number as if by its reciprocal.
    """
    heads, kv_heads, dim, dtype = 4, 2, 64, torch.bfloat16
    width = (heads + 2 * kv_heads) * dim
    qkv = (torch.arange(60 * width) * 2654435761 % 65536).view(60, width).sub(32768) / 16384
    qkv, slopes = qkv.to(dtype), torch.linspace(0.01, 0.2, heads)
    for bits in (8, 4):
        options = (bits, 2, kv_heads, 4 * RUN, dim, dtype)
        own, plain = (QuantizedKV.empty(*options, place) for place in (device, "cpu"))
        passes = ((60,), (0,)), ((8, 3), (60, 0))
        for lengths, pasts in passes:
            new = qkv[: sum(lengths)]
            there = (Batch.of(lengths, device, pasts=pasts), None, slopes.to(device))
            got = prefill_attention(new.to(device), own, *there).cpu()
            here = (Batch.of(lengths, "cpu", pasts=pasts), None, slopes)
            want = reference.prefill_attention(new, plain, *here)
            if not torch.allclose(got.float(), want.float(), atol=0.05, rtol=0.05):
                return f"the self-test of attention to keys of {bits} bits found other results"
        codes = [part.cpu() for part in own[:6]]
        if not all(torch.equal(*both) for both in zip(codes, plain[:6], strict=True)):
            return f"the self-test of attention to keys of {bits} bits found other integers"
    return None
