"""Keys and values as integers of 8 or 4 bits: what they are, and where each is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qllm.ops.kv import RUN, Batch, Scores, check_span, unrolled, zeros

# Channels of a head are padded to a multiple of this many.
CHANNELS = 16
# By bits, an integer c stands for (c - zero + base) * scale.
BASES = {8: 0, 4: 127}


class QuantizedKV(NamedTuple):
    """Keys and values of one layer as integers, after KIVI (arXiv 2402.02750).

    A row's tokens come in runs of RUN. A run whose last token has come is quantized, its keys per
    channel and its values per token; the newest run is held as it is, and its own tokens see it so.
    What a token sees thus depends on its position alone.

    Each byte holds an integer of 8 bits, or two of 4: a token's in the low half, and in the high
    half that of the token RUN / 2 behind it. D' is D padded to a multiple of CHANNELS.

    Attributes:
        keys: uint8 (R, H_kv, runs, D' / 4, RUN b / 8, 4): channels in fours.
        values: uint8 (R, H_kv, runs, RUN b / 32, D', 4): tokens in fours.
        key_scales, key_zeros: bfloat16 and uint8 (R, H_kv, runs, D').
        value_scales, value_zeros: bfloat16 and uint8 (R, H_kv, runs, RUN).
        recent_keys, recent_values: (R, H_kv, RUN, D), the newest run in the activations' type.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    key_zeros: Tensor
    value_scales: Tensor
    value_zeros: Tensor
    recent_keys: Tensor
    recent_values: Tensor

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
    ) -> QuantizedKV:
        """One that holds zeros."""
        runs, width = -(-capacity // RUN), padded_size(dim)
        lead = (rows, kv_heads, runs)

        return cls(
            zeros((*lead, width // 4, RUN * bits // 8, 4), torch.uint8, device),
            zeros((*lead, RUN * bits // 32, width, 4), torch.uint8, device),
            zeros((*lead, width), torch.bfloat16, device),
            zeros((*lead, width), torch.uint8, device),
            zeros((*lead, RUN), torch.bfloat16, device),
            zeros((*lead, RUN), torch.uint8, device),
            *zeros((2, rows, kv_heads, RUN, dim), dtype, device),
        )

    @staticmethod
    def row_bytes(bits: int, kv_heads: int, capacity: int, dim: int, dtype: torch.dtype) -> int:
        """Bytes of a row."""
        runs, width = -(-capacity // RUN), padded_size(dim)
        per_run = 2 * RUN * width * bits // 8 + 3 * (width + RUN)
        return kv_heads * (runs * per_run + 2 * RUN * dim * dtype.itemsize)

    @property
    def bits(self) -> int:
        return self.keys.shape[4] * 8 // RUN

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2] * RUN

    @property
    def dim(self) -> int:
        return self.recent_keys.shape[3]

    def check(self, qkv: Tensor, batch: Batch, scores: Scores) -> None:
        """`check_span`, and that kernels can take it."""
        assert self.recent_keys.dtype == self.recent_values.dtype == qkv.dtype
        assert all(part.is_contiguous() for part in self)
        check_span(self, batch, scores)

    @staticmethod
    def pieces(start: int, end: int) -> Iterator[range]:
        """Runs of positions, each of which may be written before the first of it is read."""
        while start < end:
            piece = range(start, min(end, start // RUN * RUN + RUN))
            yield piece
            start = piece.stop

    def write(self, rows: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put heads (N, H_kv, D) of tokens into rows (N,), at positions (N,) of one run each."""
        self.recent_keys[rows, :, positions % RUN] = keys
        self.recent_values[rows, :, positions % RUN] = values
        ended = positions % RUN == RUN - 1
        rows, runs = rows[ended], positions[ended] % self.capacity // RUN
        for row, run in zip(rows.tolist(), runs.tolist(), strict=True):
            self._quantize(row, run)

    def _quantize(self, row: int, run: int) -> None:
        """Put a row's newest run, all of which is there, among the integers, at a run of them."""
        keys, values = (
            torch.nn.functional.pad(part[row].float(), (0, self.key_zeros.shape[3] - self.dim))
            for part in (self.recent_keys, self.recent_values)
        )  # (H_kv, RUN, D')
        codes, scales, zeros = quantize(keys, self.bits, dim=1)
        codes = codes.unflatten(2, (-1, 4)).transpose(1, 2)  # (H_kv, D' / 4, RUN, 4)
        self.keys[row, :, run] = _joined(codes, 2, self.bits)
        self.key_scales[row, :, run], self.key_zeros[row, :, run] = scales[:, 0], zeros[:, 0]
        codes, scales, zeros = quantize(values, self.bits, dim=2, count=self.dim)
        codes = codes.unflatten(1, (-1, 4)).transpose(2, 3)  # (H_kv, RUN / 4, D', 4)
        self.values[row, :, run] = _joined(codes, 1, self.bits)
        self.value_scales[row, :, run] = scales[..., 0]
        self.value_zeros[row, :, run] = zeros[..., 0]

    def read(self, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows (B,) in front of `ends` (B,): (B, H_kv, max(ends), D) each.

        They are what the token in front of a row's end sees: its own run is as it came. Those whose
        memory others have taken are others'.
        """

        def of_runs(part: Tensor) -> Tensor:
            return unrolled(part, rows, runs)

        runs = -(-int(ends.max()) // RUN)
        base = BASES[self.bits]
        keys = _apart(of_runs(self.keys), 4, self.bits).transpose(3, 4).flatten(4, 5)
        scales, zeros = of_runs(self.key_scales), of_runs(self.key_zeros)
        keys = (keys.float() - (zeros[..., None, :].float() - base)) * scales[..., None, :].float()
        values = _apart(of_runs(self.values), 3, self.bits).transpose(4, 5).flatten(3, 4)
        scales, zeros = of_runs(self.value_scales), of_runs(self.value_zeros)
        values = (values.float() - (zeros[..., None].float() - base)) * scales[..., None].float()
        found = []
        for all_runs, recent in ((keys, self.recent_keys), (values, self.recent_values)):
            part = all_runs[..., : self.dim].to(recent.dtype)  # (B, H_kv, runs, RUN, D)
            part[torch.arange(len(rows)), :, (ends - 1) // RUN] = recent[rows]
            found.append(part.flatten(2, 3)[:, :, : int(ends.max())])
        return found[0], found[1]


def quantize(
    x: Tensor, bits: int, dim: int, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Integers of float32 x along a dimension: codes uint8, scales bfloat16 and zeros uint8.

    The range is from the least to the largest value, of 8 bits with 0 in it. Where a value is not
    finite the scale is NaN.

    Args:
        count: of the values along the dimension, those that are no padding.
    """
    base, steps = BASES[bits], 2**bits - 1
    real = x if count is None else x.narrow(dim, 0, count)
    low, high = real.amin(dim, keepdim=True), real.amax(dim, keepdim=True)
    finite = real.isfinite().all(dim, keepdim=True)
    if not base:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scales = (high - low) / steps
    if base:  # a zero is a byte, too: far from 0 the steps are larger
        scales = torch.maximum(scales, torch.maximum(low / base, -low / (255 - base)))
    scales = scales.to(torch.bfloat16)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    step = scales.float()
    zeros = (base - (low / step).round()).clamp(0, 255)
    codes = ((x / step).round() + (zeros - base)).clamp(0, steps)
    scales = torch.where(finite, scales, torch.full_like(scales, torch.nan))
    codes, zeros = (torch.where(finite, part, 0.0).to(torch.uint8) for part in (codes, zeros))
    return codes, scales, zeros


def _joined(codes: Tensor, dim: int, bits: int) -> Tensor:
    """Bytes of integers: those of 4 bits join those half a dimension behind them."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, dim)
    return low | high << 4


def _apart(data: Tensor, dim: int, bits: int) -> Tensor:
    """The inverse of `_joined`."""
    return data if bits == 8 else torch.cat((data & 15, data >> 4), dim)


def padded_size(dim: int) -> int:
    """Channels of a head, and those that fill it up."""
    return -(-dim // CHANNELS) * CHANNELS
