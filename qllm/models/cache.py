"""The KV cache, and the two ways a pass over the layers uses it: prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qllm.config import ModelConfig
from qllm.models.positions import PositionEncoding
from qllm.ops.reference import attention


class KVCache:
    """Keys and values of every token so far, allocated once.

    Attributes:
        keys, values: one (B, H_kv, capacity, D) per layer.
        lengths: tokens held for each of the B rows.
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
        self.keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.lengths = [0] * rows

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
        self.lengths, self.cache, self.encoding = lengths, cache, encoding
        self.positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])
        self.angles = encoding.angles(self.positions, max(lengths), x.dtype)
        # What a token sees depends on the distance alone: a shorter prompt's mask is a corner.
        self.mask = encoding.prefill_mask(max(lengths), x)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (N, H, D) over k and v (N, H_kv, D): (N, H, D)."""
        q, k = self.encoding.rotate(q, k, self.angles)
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
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)


class Decode:
    """One pass over one new token per row, attending to the cache."""

    def __init__(self, cache: KVCache, encoding: PositionEncoding, x: Tensor) -> None:
        self.cache, self.encoding = cache, encoding
        self.span = max(cache.lengths) + 1
        self.positions = torch.tensor(cache.lengths, device=x.device)
        self.rows = torch.arange(len(cache.lengths), device=x.device)
        self.angles = encoding.angles(self.positions, self.span, x.dtype)
        self.mask = encoding.decode_mask(self.positions, self.span, x)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (B, H, D), with k and v (B, H_kv, D) joining the cache: (B, H, D)."""
        q, k = self.encoding.rotate(q, k, self.angles)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        keys, values = keys[:, :, : self.span], values[:, :, : self.span]
        return attention(q[:, :, None], keys, values, self.mask, causal=False)[:, :, 0]
