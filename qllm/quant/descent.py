"""Integers of a matrix by coordinate descent on a quadratic loss, and then its groups' scales.

As QuantEase (Behdin et al. 2023, arXiv:2309.01885) and CDQuant (Nair and Suggala 2024,
arXiv:2406.17542) do, an input channel at a time gets the integers that are best with all others as
they are, again and again: where GPTQ rounds each channel once and makes up for it in those behind,
this takes any matrix on its grids and never makes it worse. What is asked for need not be the
product with a float matrix: it is whatever the products of the matrix as it is fall short of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.quant.packing import PackedWeight, group_width, pack, unpack
from qllm.quant.rtn import SMALLEST_HALF_SCALE, grouped, row_pieces

# Over all channels; the fifth changes less than a hundredth of the integers.
SWEEPS = 5
# Of integers and then of scales, which leave each other something to do.
ROUNDS = 2
# Channels whose effects on each other are followed one by one; those on others go in one product.
BLOCK = 128
# What keeps scales of groups whose effects are alike apart, of the mean of A's diagonal.
RIDGE = 1e-4
# Of what a scale was: a fit that takes nearly all of it has too little to go by.
SMALLEST_SHARE = 0.3
# Weights whose scales are fitted together: for each row there is a matrix (G, G).
WEIGHTS_AT_ONCE = 1 << 20


def descend(
    packed: PackedWeight, bits: int, group_size: int, products: Tensor, residuals: Tensor
) -> PackedWeight:
    """Lower the sum over inputs x of d |r - (W' - W) x|² by other integers and scales.

    W is the matrix as it is and W' what it becomes, r what W x falls short of what is wanted, and d
    a weight of each input. That is tr(D H D^T) - 2 tr(D R^T) for D = W' - W, up to a constant.
    Zero points stay, and the scales' type.

    Args:
        packed: W (N, K) on its grids, of the scheme "asym" or "sym".
        products: float32 (K, K), H: the sum of d x x^T.
        residuals: float32 (N, K), R: the sum of d r x^T.

    Returns:
        W' in the same form, whose loss is W's at the most.
    """
    if packed.perm is not None:  # groups are runs of channels in another order
        products = products[packed.perm][:, packed.perm]
        residuals = residuals[:, packed.perm]
    descent = _Descent(packed, bits, group_size, products, residuals)
    for _ in range(ROUNDS):
        for _ in range(SWEEPS):
            if not descent.sweep():
                break
        descent.fit_scales()
    integers = descent.values + descent.zeros[descent.group_of]
    qweight = pack(integers.to(torch.uint8).t().contiguous(), bits)
    scales = descent.scales.t().contiguous().to(packed.scales.dtype)
    return packed._replace(qweight=qweight, scales=scales)


class _Descent:
    """A matrix on its way down, channels first.

    Attributes:
        values: float32 (K, N), integers less their zeros.
        scales, zeros: float32 (G, N), the scales with the values they are stored with.
        group_of: int64 (K,).
        gradient: float32 (K, N), half of the loss's by the matrix: H D^T - R^T.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bits: int,
        group_size: int,
        products: Tensor,
        residuals: Tensor,
    ) -> None:
        columns = len(products)
        self.products, self.most = products, 2**bits - 1
        self.group = group_width(columns, group_size)
        self.half = packed.scales.dtype == torch.float16
        self.scales = packed.scales.float().t().contiguous()
        self.zeros = torch.full_like(self.scales, 2 ** (bits - 1))
        if packed.qzeros.numel():
            self.zeros = packed.qzeros.float().t().contiguous()
        self.group_of = torch.arange(columns, device=products.device) // self.group
        self.values = unpack(packed.qweight, bits, columns).t().contiguous().float()
        self.values -= self.zeros[self.group_of]
        self.gradient = -residuals.t().contiguous()
        # Of a channel that was always zero nothing is known, and it stays.
        curvature = products.diagonal()
        self.inverse = torch.where(curvature > 0, 1 / curvature, 0.0)
        self.order = curvature.argsort(descending=True, stable=True)

    def sweep(self) -> bool:
        """Give each channel its best integers, the largest inputs first; whether any changed."""
        changed = False
        for block in self.order.split(BLOCK):
            rows = self.products[block]
            within = rows[:, block]
            group = self.group_of[block]
            scales, low = self.scales[group], -self.zeros[group]
            values, gradient = self.values[block], self.gradient[block]
            by_step = self.inverse[block, None] / scales
            moves = torch.empty_like(values)
            for i, value in enumerate(values):
                best = torch.addcmul(value, gradient[i], by_step[i], value=-1).round_()
                best.clamp_(low[i], low[i] + self.most)
                torch.sub(best, value, out=moves[i]).mul_(scales[i])
                value.copy_(best)
                gradient[i + 1 :].addr_(within[i, i + 1 :], moves[i])
            if moves.any():
                changed = True
                self.values[block] = values
                self.gradient.addmm_(rows.t(), moves)
        return changed

    def fit_scales(self) -> None:
        """Give each row the scales that are best together, by least squares, where they gain."""
        columns = len(self.products)
        for rows in row_pieces(self.values.t(), WEIGHTS_AT_ONCE):
            flat = self.values[:, rows].t().contiguous()
            values = grouped(flat, self.group)  # (n, G, g)
            # With values v_i of group i, what a row puts out is the sum of s_i (v_i x): A of s is
            # v_i H v_j^T, b what the gradient says of it.
            by_pair = flat.new_empty(*values.shape[:2], values.shape[1])
            for index in range(values.shape[1]):
                span = slice(index * self.group, min((index + 1) * self.group, columns))
                product = grouped(flat[:, span] @ self.products[span], self.group)
                by_pair[:, index] = product.mul_(values).sum(-1)
            gradient = grouped(self.gradient[:, rows].t(), self.group)
            wanted = -(gradient * values).sum(-1)
            before = self.scales[:, rows].t()
            ridge = by_pair.diagonal(dim1=1, dim2=2).mean(-1) * RIDGE
            damped = by_pair.clone()
            damped.diagonal(dim1=1, dim2=2).add_(ridge.clamp_(min=1e-30)[:, None])
            after = self._storable(before + torch.linalg.solve(damped, wanted), before)
            change = after - before
            effect = (by_pair @ change[..., None])[..., 0]
            gains = (change * (effect - 2 * wanted)).sum(-1) < 0
            change *= gains[:, None]
            self.scales[:, rows] = torch.where(gains[:, None], after, before).t()
            moves = (values * change[..., None]).flatten(1)[:, :columns]
            self.gradient[:, rows] += self.products @ moves.t()

    def _storable(self, scales: Tensor, before: Tensor) -> Tensor:
        """Scales with the values they are stored with; what they were, where they cannot be."""
        if self.half:
            scales = scales.clamp(min=SMALLEST_HALF_SCALE).half().float()
        usable = scales.isfinite() & (scales > SMALLEST_SHARE * before)
        return torch.where(usable, scales, before)
