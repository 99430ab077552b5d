"""A matrix whose roundings and ranges are tuned: what `step_rounding` reads and writes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qllm.quant.rtn import SMALLEST_HALF_SCALE, grouped


class Rounding(NamedTuple):
    """A matrix (N, K) on its grids: G groups of g columns, filled up behind the last column.

    Attributes:
        ideal: float32 (N, G, g), what is rounded.
        low, high: float32 (N, G), the ends of the ranges.
        factors: float32 (2, N, G), by which the lower and the upper ends are multiplied.
        ideal_exp_avg, factor_exp_avg: averages of the gradients by what is rounded, and by factors.
        perm: int64 (K,), the columns in the order of the groups; None: as they are.
        columns: K.
        bits: of an integer.
        symmetric: both ends of a range have one factor, and there are no zeros to store.
        dtype: of the scales as they are stored.
    """

    ideal: Tensor
    low: Tensor
    high: Tensor
    factors: Tensor
    ideal_exp_avg: Tensor
    factor_exp_avg: Tensor
    perm: Tensor | None
    columns: int
    bits: int
    symmetric: bool
    dtype: torch.dtype

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1

    def rows(self, rows: slice) -> Rounding:
        """Some of the rows, which stay those of this."""
        return self._replace(
            ideal=self.ideal[rows],
            low=self.low[rows],
            high=self.high[rows],
            factors=self.factors[:, rows],
            ideal_exp_avg=self.ideal_exp_avg[rows],
            factor_exp_avg=self.factor_exp_avg[:, rows],
        )

    def grouped(self, values: Tensor) -> Tensor:
        """Rows (N, K) in float32, in the order of the groups: (N, G, g)."""
        values = values.float()
        if self.perm is not None:
            values = values[:, self.perm]
        return grouped(values, self.ideal.shape[-1])

    def flat(self, groups: Tensor) -> Tensor:
        """The inverse of `grouped`, but for the order."""
        return groups.flatten(1)[:, : self.columns]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales, with the values they are stored with, and zeros: (N, G, 1)."""
        low, high = self.low * self.factors[0], self.high * self.factors[1]
        scales = (high - low) / self.qmax
        if self.dtype == torch.float16:
            scales = scales.clamp_(min=SMALLEST_HALF_SCALE).half().float()
        zeros = torch.round(-low / scales).clamp_(0, self.qmax)
        return scales[..., None], zeros[..., None]

    def rounded(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """Integers less their zeros: (N, G, g)."""
        return self.ideal.div(scales).round_().clamp_(-zeros, self.qmax - zeros)

    def dequantize(self, matrix: Tensor) -> None:
        """Write what the integers stand for now: (N, K)."""
        scales, zeros = self.grid()
        values = self.flat(self.rounded(scales, zeros).mul_(scales))
        if self.perm is None:
            matrix.copy_(values)
        else:
            matrix.index_copy_(1, self.perm, values.to(matrix.dtype))
