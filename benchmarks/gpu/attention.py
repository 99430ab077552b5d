"""Attention of one layer to caches of several bits: of a prompt, and of a decode step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qllm import ops
from qllm.models.cache import KINDS
from qllm.ops.gpu.limits import seconds
from qllm.ops.kv import Batch

DTYPE = torch.bfloat16
DIM, KV_HEADS, SEQUENCES = 128, 8, 8
GROUPS = (1, 4)  # heads that share keys and values
WHAT = ("prompt", "step")


def measure(
    what: str, bits: str, group: int, context: int, limits: dict[str, float],
    device: torch.device, repeats: int,
) -> dict[str, object]:  # fmt: skip
    """Time of a prompt of `context` tokens, or of a step of SEQUENCES behind as many each.

    A prompt is measured against the rate of products, of which it takes half a square for scores
    and half for values; a step against the bandwidth at which it reads the cache.

    Args:
        bits: of keys and values, or "torch" for its own attention in bfloat16.
    """
    heads, is_prompt = KV_HEADS * group, what == "prompt"
    sequences = 1 if is_prompt else SEQUENCES
    width = 16 if bits == "torch" else int(bits)
    kind = KINDS[width]
    size = kind.row_bytes(width, KV_HEADS, context, DIM, DTYPE) * sequences
    tokens = context if is_prompt else SEQUENCES
    if bits == "torch":
        call = _of_torch(heads, tokens, sequences, context, device)
    else:
        kv = kind.empty(width, sequences, KV_HEADS, context, DIM, DTYPE, device)
        qkv = torch.randn(tokens, (heads + 2 * KV_HEADS) * DIM, device=device).to(DTYPE)
        kernels = ops.on(device.type)
        if is_prompt:
            attend, batch = kernels.prefill_attention, Batch.of([context], device)
        else:
            attend = kernels.decode_attention
            batch = Batch.of([1] * sequences, device, pasts=[context - 1] * sequences)
        call = partial(attend, qkv, kv, batch, None, None)

    with torch.inference_mode():
        taken = seconds([call] * 3, device, repeats)
    done = 2 * context * context * DIM * heads if is_prompt else 0
    return {
        "what": f"{what}, {context} tokens, {heads} heads, {KV_HEADS} of keys",
        "bits": bits,
        "microseconds": taken * 1e6,
        "share": done / taken / limits["bfloat16"] if done else size / taken / limits["bandwidth"],
    }


def _of_torch(
    heads: int, tokens: int, sequences: int, context: int, device: torch.device
) -> Callable[[], Tensor]:
    """torch's attention, where keys and values lie in front of it."""
    length = tokens // sequences
    q = torch.randn(sequences, heads, length, DIM, device=device).to(DTYPE)
    k, v = torch.randn(2, sequences, KV_HEADS, context, DIM, device=device).to(DTYPE)
    return lambda: F.scaled_dot_product_attention(
        q, k, v, is_causal=length > 1, enable_gqa=heads != KV_HEADS
    )
