"""The KV cache, and the two ways a pass over the layers uses it: prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qllm import ops
from qllm.config import ModelConfig
from qllm.models.positions import PositionEncoding
from qllm.ops.cpu.tape import Tape
from qllm.ops.reference import attention, rotate


class KVCache:
    """Keys and values of every token so far, allocated once.

    Attributes:
        keys, values: one (B, H_kv, capacity, D) per layer.
        lengths: tokens held for each of the B rows.
        step, tape: what decodes into it and the calls that takes, once something has.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (rows, config.num_kv_heads, capacity, config.head_dim)
        # Zeros: a shorter row's unused places are masked, but 0 * NaN would still be NaN.
        both = torch.zeros((2, config.num_layers, *shape), dtype=dtype, device=device)
        self.keys, self.values = both[0].unbind(), both[1].unbind()
        self.lengths = [0] * rows
        self.step: Decode | None = None
        self.tape: Tape | None = None

    @staticmethod
    def size(config: ModelConfig, rows: int, capacity: int, dtype: torch.dtype) -> int:
        """Bytes of a cache."""
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
        return rows * capacity * per_token


class Prefill:
    """One pass over whole prompts, each attending to itself."""

    def __init__(
        self, lengths: Sequence[int], cache: KVCache | None, encoding: PositionEncoding, x: Tensor
    ) -> None:
        self.lengths, self.cache = lengths, cache
        self.positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])
        self.angles = encoding.angles(self.positions, max(lengths), x.dtype)
        # What a token sees depends on the distance alone: a shorter prompt's mask is a corner.
        self.mask = encoding.prefill_mask(max(lengths), x)

    def attend(self, layer: int, qkv: Tensor, heads: Sequence[int]) -> Tensor:
        """Attention among the heads [queries, keys, values] of qkv (N, heads D): (N, H D)."""
        q, k, v = qkv.view(len(qkv), sum(heads), -1).split(heads, dim=1)
        if self.angles is not None:
            q, k = rotate(q, self.angles), rotate(k, self.angles)
        outputs = []
        rows = zip(*(t.split(self.lengths) for t in (q, k, v)), strict=True)
        for row, parts in enumerate(rows):
            q, k, v = (part.transpose(0, 1)[None] for part in parts)  # (1, H, T, D)
            length = self.lengths[row]
            if self.cache is not None:
                self.cache.keys[layer][row, :, :length] = k[0]
                self.cache.values[layer][row, :, :length] = v[0]
            mask = None if self.mask is None else self.mask[..., :length, :length]
            out = attention(q, k, v, mask, causal=mask is None)
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)


class Decode:
    """One pass over one new token per row, attending to the cache.

    Its tensors keep their places from token to token, so that the calls of a pass can be kept and
    made again (`qllm.ops.cpu.tape`).

    Attributes:
        tokens, positions: int64 (B,).
        angles: (B, D) each, or None.
    """

    def __init__(self, cache: KVCache, encoding: PositionEncoding) -> None:
        self.cache, self.encoding = cache, encoding
        device = cache.keys[0].device
        self.tokens = torch.zeros(len(cache.lengths), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.tokens)
        slopes = encoding.slopes
        self.slopes = None if slopes is None else slopes.to(device)
        self.angles: tuple[Tensor, Tensor] | None = None

    def begin(self, tokens: Tensor) -> None:
        """Take the next tokens (B,), which come where the cache ends."""
        self.tokens.copy_(tokens)
        self.positions.copy_(torch.tensor(self.cache.lengths))
        self.span = max(self.cache.lengths) + 1
        angles = self.encoding.angles(self.positions, self.span, self.cache.keys[0].dtype)
        if self.angles is None:
            self.angles = angles
        else:
            for kept, new in zip(self.angles, angles, strict=True):
                kept.copy_(new)

    def attend(self, layer: int, qkv: Tensor, heads: Sequence[int]) -> Tensor:
        """Attention of qkv (B, heads D), whose keys and values join the cache: (B, H D)."""
        return ops.on(qkv.device.type).decode_attention(
            qkv,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.positions,
            self.span,
            self.angles,
            self.slopes,
        )
