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

from qllm import ops
from qllm.ops.rounding import Rounding
from qllm.quant.packing import PackedWeight, group_width, pack, packed_size, unpack
from qllm.quant.rtn import grouped, row_pieces

# How far a weight reaches into the bin of an integer that is not the nearest to it.
INSIDE = 0.49
# Weights that a step goes through together: fewer cost more in calls, and in threads that wait for
# each other, than caches save.
WEIGHTS_AT_ONCE = 1 << 20


class TunedRounding:
    """A matrix (N, K) on its grids, as tuning goes on.

    Attributes:
        state: where it is.
        bits: of an integer.
    """

    def __init__(self, packed: PackedWeight, weight: Tensor, bits: int, group_size: int) -> None:
        """
        Args:
            packed: the integers and grids to start from, by any algorithm.
            weight: floating point (N, K), what was rounded to them. Where it was not rounded to
                nearest, it counts as at the border of its integer's bin.
        """
        self.bits, columns = bits, weight.shape[1]
        group, symmetric = group_width(columns, group_size), not packed.qzeros.numel()
        scales = packed.scales.float()
        zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else packed.qzeros.float()
        ideal = torch.empty(*scales.shape, group, device=scales.device)
        factors = torch.ones(2, *scales.shape, device=scales.device)
        self.state = Rounding(
            ideal,
            -zeros * scales,
            (2**bits - 1 - zeros) * scales,
            factors,
            torch.zeros_like(ideal),
            torch.zeros_like(factors),
            packed.perm,
            columns,
            bits,
            symmetric,
            packed.scales.dtype,
        )
        self.pieces = row_pieces(weight, WEIGHTS_AT_ONCE)
        for rows in self.pieces:
            values = unpack(packed.qweight[rows], bits, columns)
            start = grouped(values.float(), group).sub_(zeros[rows, :, None])
            scale = scales[rows, :, None]
            inside = self.state.grouped(weight[rows]).div(scale)
            ideal[rows] = inside.clamp_(start - INSIDE, start + INSIDE).mul_(scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the integers stand for now: (N, K)."""
        shape, device = (len(self.state.ideal), self.state.columns), self.state.ideal.device
        found = torch.empty(shape, dtype=dtype, device=device)
        for rows in self.pieces:
            self.state.rows(rows).dequantize(found[rows])
        return found

    def step(self, gradients: Tensor, rate: float, range_rate: float, matrix: Tensor) -> None:
        """Move against the signs of the gradient.

        No integer changes by more than one in steps whose rates sum up to 1/2.

        Args:
            gradients: (P, N, K), whose sum is that of the loss by `dequantize()`.
            rate: by how much offsets move, in steps of the grid.
            range_rate: by how much the factors do.
            matrix: takes what `dequantize` gives behind that.
        """
        step = ops.on(matrix.device.type).step_rounding
        for rows in self.pieces:
            step(self.state.rows(rows), gradients[:, rows], rate, range_rate, matrix[rows])

    def packed(self) -> PackedWeight:
        """The matrix as it is stored."""
        state = self.state
        qweight = torch.empty(
            len(state.ideal),
            packed_size(state.columns, self.bits),
            dtype=torch.uint8,
            device=state.ideal.device,
        )
        scales, zeros = torch.empty_like(state.low, dtype=state.dtype), torch.empty_like(state.low)
        for rows in self.pieces:
            piece = state.rows(rows)
            scale, zero = piece.grid()
            integers = piece.flat(piece.rounded(scale, zero).add_(zero))
            qweight[rows] = pack(integers.to(torch.uint8).contiguous(), self.bits)
            scales[rows], zeros[rows] = scale[..., 0], zero[..., 0]
        zeros = zeros.to(torch.uint8)
        return PackedWeight(
            qweight, scales, zeros.new_empty(0) if state.symmetric else zeros, state.perm
        )
