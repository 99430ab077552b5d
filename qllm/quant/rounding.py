"""Roundings and ranges that are tuned by the signs of gradients (SignRound, Cheng et al. 2023).

A weight w of a group becomes q = clamp(round(w / scale + v) + zero, 0, 2^b - 1), with an offset v
of its own between -1/2 and 1/2; the group's range, which scale and zero come from, has a factor of
its own for each end. Rounding counts as the identity in the gradient (a straight-through
estimator), and each step moves offsets and factors against the sign of their gradient: not of a
batch's, but of a moving average (Lion, Chen et al. 2023), since what a batch says of most weights
is noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.quant.packing import PackedWeight, group_width, pack, packed_size, unpack
from qllm.quant.rtn import SMALLEST_HALF_SCALE, grouped, row_pieces

# How far a weight reaches into the bin of an integer that is not the nearest to it.
INSIDE = 0.49
# Offsets beyond that would move a weight by more than one integer from where it started.
LARGEST_OFFSET = 0.5
# Of the average that is followed, and of the one that is kept, what each step leaves.
FOLLOWED, KEPT = 0.9, 0.975
# Of the ends of a range; a range of nothing would have no scale.
SMALLEST_FACTOR, LARGEST_FACTOR = 0.1, 1.2


def _direction(average: Tensor, gradient: Tensor) -> Tensor:
    """The signs to go against; takes the gradient into the average."""
    move = torch.lerp(gradient, average, FOLLOWED).sign_()
    average.lerp_(gradient, 1 - KEPT)
    return move


class TunedRounding:
    """A matrix (N, K) on its grids, as tuning goes on."""

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
        self.weight = torch.empty(len(weight), self.columns, device=scales.device)
        self.offsets = torch.zeros_like(self.weight)
        # Averages of the gradients by offsets, in steps of the grid, and by factors.
        self._by_offset = torch.zeros_like(self.weight)
        self._by_factor = torch.zeros_like(self.factors)
        self.pieces = row_pieces(weight)
        for rows in self.pieces:
            values = unpack(packed.qweight[rows], bits, self.columns)
            start = self._grouped(values.float()).sub_(zeros[rows, :, None])
            part = weight[rows].float()
            part = self._grouped(part if self.perm is None else part[:, self.perm])
            scale = scales[rows, :, None]
            inside = (part / scale).clamp_(start - INSIDE, start + INSIDE).mul_(scale)
            self.weight[rows] = self._flat(inside)

    @property
    def _most(self) -> int:
        return 2**self.bits - 1

    def _grouped(self, values: Tensor) -> Tensor:
        """(n, K) as (n, G, g)."""
        return grouped(values, self.group)

    def _flat(self, groups: Tensor) -> Tensor:
        return groups.flatten(1)[:, : self.columns]

    def _grid(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scales, with the values they are stored with, and zeros of some rows: (n, G, 1)."""
        low, high = self.low[rows] * self.factors[0, rows], self.high[rows] * self.factors[1, rows]
        scales = (high - low) / self._most
        if self.dtype == torch.float16:
            scales = scales.clamp_(min=SMALLEST_HALF_SCALE).half().float()
        zeros = torch.round(-low / scales).clamp_(0, self._most)
        return scales[..., None], zeros[..., None]

    def _rounded(self, rows: slice, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Integers of some rows, and where they are not clamped: (n, G, g) each."""
        ideal = self._grouped(self.weight[rows]).div(scales).add_(self._grouped(self.offsets[rows]))
        ideal = ideal.round_().add_(zeros)
        integers = ideal.clamp(0, self._most)
        return integers, integers == ideal

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the integers stand for now: (N, K)."""
        found = torch.empty_like(self.weight, dtype=dtype)
        for rows in self.pieces:
            scales, zeros = self._grid(rows)
            integers, _ = self._rounded(rows, scales, zeros)
            values = self._flat(integers.sub_(zeros).mul_(scales)).to(dtype)
            if self.perm is None:
                found[rows] = values
            else:
                found[rows] = torch.empty_like(values).index_copy_(1, self.perm, values)
        return found

    def step(self, gradient: Tensor, rate: float, range_rate: float) -> None:
        """Move against the signs of the gradient.

        Args:
            gradient: of the loss by `dequantize()`, (N, K).
            rate: by how much offsets move, in steps of the grid.
            range_rate: by how much the factors do.
        """
        for rows in self.pieces:
            part = gradient[rows].float()
            part = self._grouped(part if self.perm is None else part[:, self.perm])
            scales, zeros = self._grid(rows)
            integers, free = self._rounded(rows, scales, zeros)
            self._step_ranges(rows, part, (scales, zeros, integers, free), range_rate)
            move = _direction(self._by_offset[rows], self._flat(part.mul_(free)))
            offsets = self.offsets[rows].sub_(move, alpha=rate)
            offsets.clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)

    def _step_ranges(
        self, rows: slice, gradient: Tensor, state: tuple[Tensor, ...], rate: float
    ) -> None:
        # With s = (h - l) / most, z = -l / s and l and h the ends times their factors, a value is
        # s (q - z): where it is not clamped it follows w, so that its derivative by s is
        # q - z - w / s and none by z; where it is, they are q - z and -s.
        scales, zeros, integers, free = state
        weight = self._grouped(self.weight[rows])
        by_scale = integers.sub_(zeros).addcmul_(weight / scales, free, value=-1)
        by_scale = by_scale.mul_(gradient).sum(-1)  # (n, G)
        by_zero = (gradient * ~free).sum(-1).mul_(-scales[..., 0])
        scale, (low, high) = scales[..., 0], (self.low[rows], self.high[rows])
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
            len(self.weight),
            packed_size(self.columns, self.bits),
            dtype=torch.uint8,
            device=self.weight.device,
        )
        scales, zeros = torch.empty_like(self.low, dtype=self.dtype), torch.empty_like(self.low)
        for rows in self.pieces:
            grid = self._grid(rows)
            integers, _ = self._rounded(rows, *grid)
            qweight[rows] = pack(self._flat(integers).to(torch.uint8).contiguous(), self.bits)
            scales[rows], zeros[rows] = (part[..., 0] for part in grid)
        zeros = zeros.to(torch.uint8)
        return PackedWeight(
            qweight, scales, zeros.new_empty(0) if self.symmetric else zeros, self.perm
        )
