"""Integers of a matrix by coordinate descent on a quadratic loss, and then its groups' scales.

The last linear of a tuned block comes nearer to what the float layer puts out, over all samples:
what it puts out is added to the rest, so that the block's squared error is quadratic in its weight,
and sums over all tokens say all of it. Steps of tuning see a few samples each, and move no integer
by more than one.

As QuantEase (Behdin et al. 2023, arXiv:2309.01885) and CDQuant (Nair and Suggala 2024,
arXiv:2406.17542) do, an input channel at a time gets the integers that are best with all others as
they are, again and again: where GPTQ rounds each channel once and makes up for it in those behind,
this takes any matrix on its grids and never makes it worse. What is asked for need not be the
product with a float matrix: it is whatever the products of the matrix as it is fall short of. Nor
need what is put out count alike: a metric ties rows together, of which some move at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.equalize import dense_linear
from qllm.models.layer import Block, PreNormLayer
from qllm.quant.inputs import InputStats
from qllm.quant.packing import PackedWeight, group_width, pack, unpack
from qllm.quant.rtn import SMALLEST_HALF_SCALE, grouped
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.tune import multiplying_in, token_sizes, tuned_samples

# Over all channels; the fifth changes less than a hundredth of the integers.
SWEEPS = 5
# Of integers and then of scales, which leave each other something to do.
ROUNDS = 2
# Of rows that move as if the others of their set stood still. Neighbours are in different ones.
ROW_SETS = 8
# Channels whose effects on each other are followed one by one; those on others of a span go in one
# product, those of a span on all others in another, since wide products take half the time.
BLOCK = 128
SPAN = 1024
# What keeps scales of groups whose effects are alike apart, of the mean of A's diagonal.
RIDGE = 1e-4
# Of what a scale was: a fit that takes nearly all of it has too little to go by.
SMALLEST_SHARE = 0.3
# Weights whose scales are fitted together: for each row there is a matrix (G, G).
WEIGHTS_AT_ONCE = 1 << 21


def descend_last(
    layer: PreNormLayer,
    block: tuple[Block, Sequence[str]],
    name: str,
    linear: WeightOnlyLinear,
    states: tuple[HiddenStates, HiddenStates],
    metric: Tensor,
    dtype: torch.dtype,
) -> WeightOnlyLinear:
    """Other integers and scales for a linear of a layer whose blocks `blocks_end_in_sums`.

    Tokens count as in `token_errors`; samples that are held out do not.

    Args:
        layer: its linears are matrices in float32, and stay.
        block: the one of the layer that the linear is in.
        name: the linear's in the layer, where there is its matrix.
        linear: on its grids.
        states: those in front of the block, and those wanted behind it.
        metric: as of `token_errors`.
        dtype: what products are computed in.
    """
    run, names = block
    inputs, targets = (each.part(slice(tuned_samples(len(each.states)))) for each in states)
    residuals = torch.zeros_like(dense_linear(layer, name).weight)
    device = residuals.device

    def multiply(a: Tensor, b: Tensor, _: None) -> Tensor:
        return ops.multiply(a.to(dtype), b.to(dtype)).float()

    stats = InputStats(linear.in_features, device, products=True, multiply=multiply)
    seen: list[Tensor] = []

    def see(_: nn.Module, given: tuple[Tensor]) -> None:
        seen.append(given[0])

    with multiplying_in(dtype, layer, names):
        hook = layer.get_submodule(name).register_forward_pre_hook(see)
        try:
            for (_, x, step), (_, wanted, _) in zip(inputs.passes(), targets.passes(), strict=True):
                missing = wanted - run(x, step)
                weight = token_sizes(wanted)[:, None].rsqrt_()
                given = seen.pop() * weight
                stats.add(given)
                missing.mul_(weight / layer.output_scale)
                residuals += multiply(missing.t(), given.t(), None)
        finally:
            hook.remove()
    products = stats.hessian
    assert products is not None
    spec = linear.spec
    packed = descend(linear.packed, spec.bits, spec.group_size, products, residuals, metric)
    return WeightOnlyLinear.from_packed(packed, linear.bias, spec, linear.in_features)


def descend(
    packed: PackedWeight,
    bits: int,
    group_size: int,
    products: Tensor,
    residuals: Tensor,
    metric: Tensor,
) -> PackedWeight:
    """Lower the sum over inputs x of d e^T M e, e = r - (W' - W) x, by other integers and scales.

    W is the matrix as it is and W' what it becomes, r what W x falls short of what is wanted, and d
    a weight of each input. That is tr(M D H D^T) - 2 tr(M D R^T) for D = W' - W, up to a constant.
    Zero points stay, and the scales' type.

    Args:
        packed: W (N, K) on its grids, of the scheme "asym" or "sym".
        products: float32 (K, K), H: the sum of d x x^T.
        residuals: float32 (N, K), R: the sum of d r x^T.
        metric: float32 (N, N), M, positive definite.

    Returns:
        W' in the same form, whose loss is W's at the most.
    """
    if packed.perm is not None:  # groups are runs of channels in another order
        products = products[packed.perm][:, packed.perm]
        residuals = residuals[:, packed.perm]
    descent = _Descent(packed, bits, group_size, products, residuals, metric)
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
        order: int64 (K,), the channels with the largest inputs first.
        ordered: float32 (K, K), `products` in that order.
        gradient: float32 (K, N), half of the loss's by the matrix where M is 1: H D^T - R^T.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bits: int,
        group_size: int,
        products: Tensor,
        residuals: Tensor,
        metric: Tensor,
    ) -> None:
        columns, rows = len(products), torch.arange(len(metric), device=metric.device)
        self.products, self.metric, self.qmax = products, metric, 2**bits - 1
        self.row_sets = [rows[start::ROW_SETS] for start in range(min(ROW_SETS, len(rows)))]
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
        self.ordered = products[self.order][:, self.order]

    def _weighed(self, rows: Tensor) -> Tensor:
        """The gradient (K, n) of some rows, over what M makes of each by itself."""
        return ops.multiply(self.gradient, self.metric[rows]) / self.metric.diagonal()[rows]

    def _gains(self, rows: Tensor, moves: Tensor, weighed: Tensor, effect: Tensor) -> bool:
        """Whether moves (K, n) of some rows lower the loss, which they do to each by itself.

        Args:
            weighed, effect: their gradient in front of them, and H times them: (K, n).
        """
        among = self.metric[rows][:, rows]
        change = 2 * weighed * among.diagonal() + ops.multiply(effect, among)
        return bool((moves * change).sum(dtype=torch.float64) < 0)

    def sweep(self) -> bool:
        """Give each channel its best integers, the largest inputs first; whether any changed."""
        changed, order, inverse_perm = False, self.order, self.order.argsort()
        groups, inverse = self.group_of[order], self.inverse[order]
        descend_block = ops.on(order.device.type).descend_block
        for rows in self.row_sets:
            weighed = self._weighed(rows)
            values, after = self.values[:, rows][order], weighed[order]
            moves = torch.empty_like(values)
            scales, low = (each[:, rows][groups] for each in (self.scales, -self.zeros))
            step_sizes = inverse[:, None] / scales
            for span in _slices(slice(0, len(order)), SPAN):
                for block in _slices(span, BLOCK):
                    given = (each[block] for each in (values, after, scales, low, step_sizes))
                    found = descend_block(self.ordered[block, block], *given, self.qmax)
                    values[block], moves[block] = found
                    after[span].addmm_(self.ordered[span, block], moves[block])
                effect = ops.multiply(moves[span].t(), self.ordered[span].t()).t()
                for others in (slice(0, span.start), slice(span.stop, None)):
                    after[others] += effect[others]
            values, moves, after = (each[inverse_perm] for each in (values, moves, after))
            effect = after - weighed
            if self._gains(rows, moves, weighed, effect):
                changed = True
                self.values[:, rows] = values
                self.gradient[:, rows] += effect
        return changed

    def fit_scales(self) -> None:
        """Give each row the scales that are best together, by least squares, where they gain."""
        columns, at_once = len(self.products), max(1, WEIGHTS_AT_ONCE // len(self.products))
        for rows in [piece for whole in self.row_sets for piece in whole.split(at_once)]:
            flat = self.values[:, rows].t().contiguous()
            values = grouped(flat, self.group)  # (n, G, g)
            # With values v_i of group i, what a row puts out is the sum of s_i (v_i x): A of s is
            # v_i H v_j^T, b what the gradient says of it.
            by_pair = flat.new_empty(*values.shape[:2], values.shape[1])
            for index in range(values.shape[1]):
                span = slice(index * self.group, min((index + 1) * self.group, columns))
                product = ops.multiply(flat[:, span], self.products[span].t())
                by_pair[:, index] = grouped(product, self.group).mul_(values).sum(-1)
            weighed = self._weighed(rows)
            wanted = -(grouped(weighed.t(), self.group) * values).sum(-1)
            before = self.scales[:, rows].t()
            ridge = by_pair.diagonal(dim1=1, dim2=2).mean(-1) * RIDGE
            damped = by_pair.clone()
            damped.diagonal(dim1=1, dim2=2).add_(ridge.clamp_(min=1e-30)[:, None])
            after = self._storable(before + torch.linalg.solve(damped, wanted), before)
            change = after - before
            effect = (by_pair @ change[..., None])[..., 0]
            change *= ((change * (effect - 2 * wanted)).sum(-1) < 0)[:, None]
            moves = (values * change[..., None]).flatten(1)[:, :columns].t()
            of_moves = ops.multiply(self.products, moves.t())
            if self._gains(rows, moves, weighed, of_moves):
                self.scales[:, rows] = torch.where(change != 0, after, before).t()
                self.gradient[:, rows] += of_moves

    def _storable(self, scales: Tensor, before: Tensor) -> Tensor:
        """Scales with the values they are stored with; what they were, where they cannot be."""
        if self.half:
            scales = scales.clamp(min=SMALLEST_HALF_SCALE).half().float()
        usable = scales.isfinite() & (scales > SMALLEST_SHARE * before)
        return torch.where(usable, scales, before)


def _slices(whole: slice, width: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, width):
        yield slice(start, min(start + width, whole.stop))
