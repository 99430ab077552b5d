"""Roundings and ranges that are tuned by the signs of gradients (SignRound, Cheng et al. 2023).

A weight w of a group becomes q = clamp(round(w / scale + v) + zero, 0, 2^b - 1), with an offset v
of its own between -1/2 and 1/2; the group's range, which scale and zero come from, has a factor of
its own for each end. Rounding counts as the identity in the gradient (a straight-through
estimator), and each step moves offsets and factors against the sign of their gradient: not of a
batch's, but of a moving average (Lion, Chen et al. 2023), since what a batch says of most weights
is noise. What is kept of a weight is w + v * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.quant.packing import PackedWeight, group_width, pack, packed_size, unpack
from qllm.quant.rtn import SMALLEST_HALF_SCALE, grouped, row_pieces

# How far a weight reaches into the bin of an integer that is not the nearest to it.
INSIDE = 0.49
# Of the average that is followed, and of the one that is kept, what each step leaves.
FOLLOWED, KEPT = 0.9, 0.975
# Of the ends of a range; a range of nothing would have no scale.
SMALLEST_FACTOR, LARGEST_FACTOR = 0.1, 1.2
# Weights that a step goes through together: fewer cost more in calls, and in threads that wait for
# each other, than caches save.
WEIGHTS_AT_ONCE = 1 << 20


def _direction(average: Tensor, gradient: Tensor) -> Tensor:
    """The signs to go against; takes the gradient into the average."""
    move = torch.lerp(gradient, average, FOLLOWED).sign_()
    average.lerp_(gradient, 1 - KEPT)
    return move


class TunedRounding:
    """A matrix (N, K) on its grids, as tuning goes on.

    Attributes:
        ideal: float32 (N, G, g), what is rounded, filled up behind the last column.
        factors: float32 (2, N, G), of the lower and upper ends of the ranges.
    """

    def __init__(self, packed: PackedWeight, weight: Tensor, bits: int, group_size: int) -> None:
        """
        Args:
            packed: the integers and grids to start from, by any algorithm.
            weight: floating point (N, K), what was rounded to them. Where it was not rounded to
                nearest, it counts as at the border of its integer's bin.
        """
        self.bits, self.columns = bits, weight.shape[1]
        self.group = group_width(self.columns, group_size)
        self.symmetric, self.perm = not packed.qzeros.numel(), packed.perm
        self.dtype = packed.scales.dtype
        scales = packed.scales.float()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if not self.symmetric:
            zeros = packed.qzeros.float()
        self.low, self.high = -zeros * scales, (self._most - zeros) * scales  # (N, G)
        self.factors = torch.ones(2, *scales.shape, device=scales.device)
        self.ideal = torch.empty(*scales.shape, self.group, device=scales.device)
        # Averages of the gradients by what is rounded, and by factors.
        self._by_ideal = torch.zeros_like(self.ideal)
        self._by_factor = torch.zeros_like(self.factors)
        self.pieces = row_pieces(weight, WEIGHTS_AT_ONCE)
        for rows in self.pieces:
            values = unpack(packed.qweight[rows], bits, self.columns)
            start = grouped(values.float(), self.group).sub_(zeros[rows, :, None])
            scale = scales[rows, :, None]
            inside = self._grouped(weight[rows]).div(scale)
            self.ideal[rows] = inside.clamp_(start - INSIDE, start + INSIDE).mul_(scale)

    @property
    def _most(self) -> int:
        return 2**self.bits - 1

    def _grouped(self, values: Tensor) -> Tensor:
        """Rows (n, K) in float32, in the order of the groups: (n, G, g)."""
        values = values.float()
        return grouped(values if self.perm is None else values[:, self.perm], self.group)

    def _flat(self, groups: Tensor) -> Tensor:
        """The inverse of `_grouped`, but for the order."""
        return groups.flatten(1)[:, : self.columns]

    def _grid(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scales, with the values they are stored with, and zeros of some rows: (n, G, 1)."""
        low, high = self.low[rows] * self.factors[0, rows], self.high[rows] * self.factors[1, rows]
        scales = (high - low) / self._most
        if self.dtype == torch.float16:
            scales = scales.clamp_(min=SMALLEST_HALF_SCALE).half().float()
        zeros = torch.round(-low / scales).clamp_(0, self._most)
        return scales[..., None], zeros[..., None]

    def _rounded(self, rows: slice, scales: Tensor, zeros: Tensor) -> Tensor:
        """Integers of some rows less their zeros: (n, G, g)."""
        return self.ideal[rows].div(scales).round_().clamp_(-zeros, self._most - zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the integers stand for now: (N, K)."""
        shape = len(self.ideal), self.columns
        found = torch.empty(shape, dtype=dtype, device=self.ideal.device)
        for rows in self.pieces:
            self._dequantize(rows, found)
        return found

    def _dequantize(self, rows: slice, matrix: Tensor) -> None:
        """Write some rows of what `dequantize` gives."""
        scales, zeros = self._grid(rows)
        values = self._flat(self._rounded(rows, scales, zeros).mul_(scales))
        if self.perm is None:
            matrix[rows] = values
        else:
            matrix[rows].index_copy_(1, self.perm, values.to(matrix.dtype))

    def step(self, gradient: Tensor, rate: float, range_rate: float, matrix: Tensor) -> None:
        """Move against the signs of the gradient.

        No integer changes by more than one in steps whose rates sum up to 1/2.

        Args:
            gradient: of the loss by `dequantize()`, (N, K).
            rate: by how much offsets move, in steps of the grid.
            range_rate: by how much the factors do.
            matrix: takes what `dequantize` gives behind that.
        """
        for rows in self.pieces:
            by_value = self._grouped(gradient[rows])
            scales, zeros = self._grid(rows)
            steps = self.ideal[rows] / scales
            nearest = steps.round()
            integers = nearest.clamp(-zeros, self._most - zeros)
            # What is clamped has no gradient.
            by_ideal = nearest.eq_(integers).mul_(by_value)
            # With s = (h - l) / most, z = -l / s and l and h the ends times their factors, a value
            # is s (q - z): where it is not clamped it follows w, so that its derivative by s is
            # q - z - w / s and none by z; where it is, they are q - z and -s.
            by_scale = integers.mul_(by_value).sum(-1) - steps.mul_(by_ideal).sum(-1)
            by_zero = (by_ideal.sum(-1) - by_value.sum(-1)).mul_(scales[..., 0])
            move = _direction(self._by_ideal[rows], by_ideal).mul_(scales)
            self.ideal[rows].sub_(move, alpha=rate)
            self._step_ranges(rows, scales[..., 0], (by_scale, by_zero), range_rate)
            self._dequantize(rows, matrix)

    def _step_ranges(
        self, rows: slice, scale: Tensor, gradients: tuple[Tensor, Tensor], rate: float
    ) -> None:
        """Move the factors, given gradients by scale and by zero: (n, G) each."""
        by_scale, by_zero = gradients
        low, high = self.low[rows], self.high[rows]
        by_scale += by_zero * low * self.factors[0, rows] / scale.square()
        ends = torch.stack((-by_scale * low / self._most - by_zero * low / scale,
                            by_scale * high / self._most))  # fmt: skip
        if self.symmetric:  # both ends have one factor
            ends = ends.sum(0, keepdim=True).expand_as(ends)
        move = _direction(self._by_factor[:, rows], ends)
        factors = self.factors[:, rows].sub_(move, alpha=rate)
        factors.clamp_(SMALLEST_FACTOR, LARGEST_FACTOR)

    def packed(self) -> PackedWeight:
        """The matrix as it is stored."""
        qweight = torch.empty(
            len(self.ideal),
            packed_size(self.columns, self.bits),
            dtype=torch.uint8,
            device=self.ideal.device,
        )
        scales, zeros = torch.empty_like(self.low, dtype=self.dtype), torch.empty_like(self.low)
        for rows in self.pieces:
            scale, zero = self._grid(rows)
            integers = self._flat(self._rounded(rows, scale, zero).add_(zero))
            qweight[rows] = pack(integers.to(torch.uint8).contiguous(), self.bits)
            scales[rows], zeros[rows] = scale[..., 0], zero[..., 0]
        zeros = zeros.to(torch.uint8)
        return PackedWeight(
            qweight, scales, zeros.new_empty(0) if self.symmetric else zeros, self.perm
        )
