"""What the decoder, its KV cache and the kernels of attention agree on: rows, offsets, memory.

A pass takes N tokens of B sequences, one sequence after the other and without padding. Each
sequence has a row of the cache, in which the token at position p stands at p modulo the capacity; a
row may begin, go on and end whatever the others do, and a pass takes those that are asked for.

Where a layer's tokens see no further back than a window, its capacity may be below the length of a
sequence: new tokens then take the memory of those that none will see again (`ring_capacity`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qllm.ops.cpu import library

if TYPE_CHECKING:
    from qllm.ops.quantized_kv import QuantizedKV


# Tokens of a row that are quantized together, once the last of them has come; and to whose memory
# others come together where a capacity is below the length.
RUN = 64


class Batch(NamedTuple):
    """Which tokens a pass takes: vLLM's and nano-vllm's attention metadata.

    Attributes:
        rows: int64 (B,), the cache row of each sequence.
        starts: int64 (B + 1,), where the tokens of each begin among the N: "cu_seqlens".
        positions: int64 (N,), of each token in its sequence; those of a sequence follow each other.
        max_tokens: of one sequence in this pass.
        span: the largest position + 1, of the keys that are read.
        last: results are asked for of each sequence's last token alone: B of them, in place of N.
    """

    rows: Tensor
    starts: Tensor
    positions: Tensor
    max_tokens: int
    span: int
    last: bool = False

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str,
        rows: Sequence[int] | None = None,
        pasts: Sequence[int] | None = None,
    ) -> Batch:
        """Sequences of so many tokens, behind `pasts` (none) others, in `rows` (0, 1, …)."""
        pasts = [0] * len(lengths) if pasts is None else pasts
        ends = [past + length for past, length in zip(pasts, lengths, strict=True)]
        positions = torch.cat([torch.arange(*run) for run in zip(pasts, ends, strict=True)])
        index = torch.tensor([*range(len(lengths))] if rows is None else list(rows))
        starts = torch.tensor([0, *lengths]).cumsum(0)
        index, starts, positions = (part.to(device) for part in (index, starts, positions))
        return cls(index, starts, positions, max(lengths), max(ends))

    def select(self, x: Tensor) -> Tensor:
        """Of what there is for each token (N, …), that of which results are asked for."""
        return x[self.starts[1:] - 1] if self.last else x


class Scores(NamedTuple):
    """What a layer's attention makes of the products of a query and the keys.

    Attributes:
        scale: multiplies them; None: 1 / sqrt(D).
        cap: what comes of that is cap tanh(score / cap); 0: as it is.
        window: how many tokens a query sees, its own included; 0: all before it.
        sinks: float32 (H,), a score that joins each softmax of a head, and weighs no value (Xiao et
            al. 2023; gpt-oss); None: there is none.
    """

    scale: float | None = None
    cap: float = 0.0
    window: int = 0
    sinks: Tensor | None = None

    def factor(self, dim: int) -> float:
        """What multiplies the products, for heads of `dim` channels."""
        return 1 / math.sqrt(dim) if self.scale is None else self.scale


PLAIN = Scores()


def ring_capacity(window: int, tokens: int) -> int:
    """Tokens that a row needs memory for, whatever its length, in passes of so many `tokens` of it.

    A pass writes all of its tokens before the first of them has seen those in its window, which
    begins anywhere in a run.
    """
    return (window - 1 + tokens + RUN - 2) // RUN * RUN + RUN


def check_span(kv: KV | QuantizedKV, batch: Batch, scores: Scores) -> None:
    """Refuse a pass that would write over what its tokens see.

    Raises:
        IndexError: a sequence is longer than a row.
    """
    needed = batch.span
    if scores.window:
        needed = min(needed, ring_capacity(scores.window, batch.max_tokens))
    if needed > kv.capacity:
        raise IndexError(f"{needed} tokens in a cache for {kv.capacity}")


def unrolled(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """What rows (B,) hold for the first `count` positions, or runs: (B, H_kv, count, …)."""
    if count <= part.shape[2]:
        return part[rows, :, :count]
    return part[rows][:, :, torch.arange(count, device=part.device) % part.shape[2]]


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory of a cache: what is large stands on huge pages, where a CPU's kernels read it."""
    nbytes = math.prod(shape) * dtype.itemsize
    if (
        nbytes < library.HUGE_PAGE
        or library.unsupported_reason(torch.device(device).type) is not None
    ):
        return torch.zeros(shape, dtype=dtype, device=device)
    return library.huge_pages(nbytes).zero_().view(dtype).view(shape)


class KV(NamedTuple):
    """Keys and values of one layer, in the type of the activations.

    Another kind of cache is a class with the same methods (`qllm.ops.quantized_kv` is one) and a
    row in `qllm.models.cache.KINDS`.

    Attributes:
        keys, values: (R, H_kv, capacity, D).
    """

    keys: Tensor
    values: Tensor

    @property
    def bits(self) -> int:
        """Of a key or value, 16 for the activations' own type, whatever that is."""
        return 16

    @classmethod
    def empty(
        cls,
        bits: int,
        rows: int,
        kv_heads: int,
        capacity: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KV:
        """One that holds zeros: places that are masked are read, and 0 * NaN would be NaN."""
        shape = (2, rows, kv_heads, capacity, dim)
        return cls(*zeros(shape, dtype, device))

    @staticmethod
    def row_bytes(bits: int, kv_heads: int, capacity: int, dim: int, dtype: torch.dtype) -> int:
        """Bytes of a row."""
        return 2 * kv_heads * capacity * dim * dtype.itemsize

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def dim(self) -> int:
        return self.keys.shape[3]

    def check(self, qkv: Tensor, batch: Batch, scores: Scores) -> None:
        """`check_span`, and that kernels can take it."""
        assert self.keys.dtype == self.values.dtype == qkv.dtype
        assert all(part.is_contiguous() for part in self)
        check_span(self, batch, scores)

    @staticmethod
    def pieces(start: int, end: int) -> Iterator[range]:
        """Runs of positions, each of which may be written before the first of it is read."""
        yield range(start, end)

    def write(self, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put heads (N, H_kv, D) of tokens into rows (N,), at positions (N,)."""
        self.keys[rows, :, positions % self.capacity] = keys
        self.values[rows, :, positions % self.capacity] = values

    def read(self, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows (B,) in front of `ends` (B,): (B, H_kv, max(ends), D) each.

        Those whose memory others have taken are others'.
        """
        span = int(ends.max())
        return unrolled(self.keys, rows, span), unrolled(self.values, rows, span)
