"""GPTQ (Frantar et al. 2023): round column by column, later columns making up for the error.

With e = w - q the squared output error of a row is e H e^T for H = X X^T. Let H = R R^T with R
upper triangular. Then e H e^T is the sum over columns k of (e_k R_kk + p_k)^2, where
p_k = sum_{j<k} e_j R_jk depends on the columns before k alone. So each column is rounded at
w_k + p_k / R_kk, which makes its own term as small as the grid allows. That is what the paper
computes from the inverse of H (Chen et al. 2025, arXiv:2507.18553, show it), with one Cholesky
factorization and no inverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qllm.quant.algorithm import Algorithm, Form, GPTQOptions, QuantizeOptions, TuningStart, yes
from qllm.quant.clip import clipped_qparams, clipped_qparams_by_channel
from qllm.quant.inputs import InputStats
from qllm.quant.packing import PackedWeight, group_width, pack, packed_size
from qllm.quant.rtn import FindQParams, minmax_qparams, store_scales, zero_points

# Rows are independent: this many at a time keep a panel of columns in cache.
CHUNK_ROWS = 4096
# Inside a panel, errors reach the columns behind these at once, as a product.
SUB_COLUMNS = 32
# Where a damped Hessian cannot be factored in float32, it is damped this much more.
MORE_DAMPING = 10.0


class GPTQ(Algorithm):
    """See above."""

    name = "gptq"
    settings = (
        *("damp", "block_size", "act_order", "static_groups"),
        *("true_sequential", "refine"),
    )
    calibrates = products = True

    def sequential(self, options: QuantizeOptions) -> bool:
        return options.true_sequential

    def quantize(
        self,
        weight: Tensor,
        form: Form,
        hessian: Tensor | None,
        options: QuantizeOptions,
        *,
        in_scores: bool,
    ) -> tuple[PackedWeight, float]:
        assert hessian is not None  # it needs inputs
        find_qparams = clipped_qparams if options.clip else minmax_qparams
        return quantize_gptq(weight, hessian, *form, options.gptq, find_qparams)

    def tunes(self, options: QuantizeOptions) -> bool:
        return options.refine

    def tuning_start(
        self, weight: Tensor, form: Form, stats: InputStats, options: QuantizeOptions
    ) -> TuningStart:
        # Narrower grids alone would often make a matrix worse; tuning makes up for what they clip.
        find_qparams = clipped_qparams_by_channel(stats.squares)
        if not options.gptq.static_groups:  # whose grids are found on the way, column by column
            find_qparams = minmax_qparams
        assert stats.hessian is not None  # it needs inputs
        rounded = torch.empty_like(weight, dtype=torch.float32)
        packed, _ = quantize_gptq(weight, stats.hessian, *form, options.gptq, find_qparams, rounded)
        return TuningStart(packed, rounded)

    def describe(self, options: QuantizeOptions) -> str:
        gptq, tune = options.gptq, options.tune
        refined = f"; then {tune}" if options.refine else ""
        return (
            f"GPTQ: dampening {gptq.damp}, block {gptq.block_size}, act-order "
            f"{yes(gptq.act_order)}, static groups {yes(gptq.static_groups)}, "
            f"true-sequential {yes(options.true_sequential)}{refined}"
        )


def triangular_root(hessian: Tensor, perm: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper triangular R with R R^T = H + damp · mean(diag H) · I, and the damping it took.

    Args:
        hessian: float32 (K, K), symmetric, no negative eigenvalues but those of rounding.
        perm: int64 (K,); H has its rows and columns in this order.
        damp: 0 or more; raised tenfold (from 1e-4 at least) as often as the factorization fails.

    Raises:
        ValueError: a diagonal that is not finite, which no damping helps.
    """
    # The Cholesky factor L of the matrix with both axes reversed is lower triangular, and its
    # own reversal is R.
    last_first = perm.flip(0)
    reverse = hessian.index_select(0, last_first).index_select(1, last_first)
    mean = reverse.diagonal().mean().item() or 1.0
    if not math.isfinite(mean):
        raise ValueError(f"the Hessian's diagonal has a mean of {mean}")
    reverse.diagonal().add_(damp * mean)
    while True:
        root, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            return root.flip(0, 1), damp
        more = max(damp * MORE_DAMPING, 1e-4)
        reverse.diagonal().add_((more - damp) * mean)
        damp = more


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    scheme: str,
    options: GPTQOptions | None = None,
    find_qparams: FindQParams = minmax_qparams,
    compensated: Tensor | None = None,
) -> tuple[PackedWeight, float]:
    """Quantize a matrix so that its product with the inputs behind H changes little.

    Args:
        weight: floating point (N, K), finite.
        hessian: float32 (K, K): the sum, or mean, of x x^T over input vectors x. An input channel
            that is always zero is rounded to nearest.
        find_qparams: finds the groups' grids: `minmax_qparams`, or `clipped_qparams`.
        compensated: float32 (N, K), takes what was rounded: weights that make up for the errors
            of those rounded before them.

    Returns:
        the matrix, and the damping that its factorization took.
    """
    options = options or GPTQOptions()
    rows, columns = weight.shape
    group = group_width(columns, group_size)
    static = options.static_groups or group == columns
    perm = torch.arange(columns, device=weight.device)
    if options.act_order:
        perm = hessian.diagonal().argsort(descending=True, stable=True)
    root, damp = triangular_root(hessian, perm, options.damp)
    groups = ((perm if static else torch.arange(columns)) // group).tolist()

    packed = weight.new_empty(rows, packed_size(columns, bits), dtype=torch.uint8)
    grids = []
    for start in range(0, rows, CHUNK_ROWS):
        part = weight[start : start + CHUNK_ROWS].float()
        grid = _Grid(part, group, bits, scheme, find_qparams)
        if static:
            grid.set_groups(0, part)
        work = part[:, perm].t().contiguous()
        rounded = None if compensated is None else torch.empty_like(work)
        integers = _round_columns(work, root, grid, groups, options.block_size, static, rounded)
        if rounded is not None and compensated is not None:
            compensated[start : start + CHUNK_ROWS].t().index_copy_(0, perm, rounded)
        if static:  # the groups are runs of channels, so the channels go back to their places
            integers = torch.empty_like(integers).index_copy_(0, perm, integers)
        packed[start : start + CHUNK_ROWS] = pack(integers.t(), bits)
        grids.append(grid)
    scales = torch.cat([grid.scales for grid in grids], dim=1).t().contiguous()
    if all(grid.half for grid in grids):  # one type for the matrix; a half is exact as a float
        scales = scales.half()
    zeros = scales.new_empty(0, dtype=torch.uint8)
    if scheme == "asym":
        zeros = torch.cat([grid.zeros for grid in grids], dim=1).t().to(torch.uint8).contiguous()
    moved = options.act_order and not static
    return PackedWeight(packed, scales, zeros, perm if moved else None), damp


class _Grid:
    """The grid of each group of n rows, found all at once or as the columns come.

    Attributes:
        scales, zeros: float32 (G, n), the scales with the values they are stored with.
        half: whether each of them is a float16.
    """

    def __init__(
        self, part: Tensor, group: int, bits: int, scheme: str, find_qparams: FindQParams
    ) -> None:
        rows, columns = part.shape
        self.group, self.bits, self.scheme, self.find_qparams = group, bits, scheme, find_qparams
        self.scales = part.new_empty(-(-columns // group), rows)
        self.zeros = torch.empty_like(self.scales)
        self.half = True

    def set_groups(self, index: int, part: Tensor) -> None:
        """The grids of the group `index` and those behind it, from their weights (n, C)."""
        scales, min_vals = self.find_qparams(part, self.bits, self.group, self.scheme)
        scales = store_scales(scales)
        zeros = zero_points(min_vals, scales, self.bits, self.scheme)
        span = slice(index, index + scales.shape[1])
        self.scales[span], self.zeros[span] = scales.t(), zeros.t()
        self.half = self.half and scales.dtype == torch.float16


def _round_columns(
    weight: Tensor,
    root: Tensor,
    grid: _Grid,
    groups: list[int],
    block_size: int,
    static: bool,
    compensated: Tensor | None,
) -> Tensor:
    """Round weights (K, n), columns first, in their order.

    Args:
        groups: the group of each column.
        static: the grids are there already; else each group's comes from its weights and what
            the errors in front of it ask of them.
        compensated: (K, n), takes what was rounded; None: it is not wanted.

    Returns:
        uint8 (K, n).
    """
    columns = len(weight)
    integers = torch.empty_like(weight, dtype=torch.uint8)
    errors = torch.empty_like(weight)
    diagonal = root.diagonal().tolist()
    group = columns if static else grid.group
    # A panel holds whole groups where these are found on the way, and is at most a group else.
    panel = min(block_size, columns) if static else group * max(1, block_size // group)
    for start in range(0, columns, panel):
        end = min(start + panel, columns)
        pending = root[:start, start:end].t() @ errors[:start]  # p, (end - start, n)
        first = start
        while first < end:
            in_group = group - first % group
            last = min(first + min(SUB_COLUMNS, in_group), end)
            if not static and in_group == group:
                span = slice(first, min(first + group, end))
                asked = pending[first - start : span.stop - start]
                triangle = root[span, span].t()
                shift = torch.linalg.solve_triangular(triangle, asked, upper=False)
                grid.set_groups(groups[first], (weight[span] + shift).t())
            for k in range(first, last):
                scale, zero = grid.scales[groups[k]], grid.zeros[groups[k]]
                q = torch.add(weight[k], pending[k - start], alpha=1 / diagonal[k])
                if compensated is not None:
                    compensated[k] = q
                q = q.div_(scale).round_().add_(zero).clamp_(0, 2**grid.bits - 1)
                integers[k] = q
                torch.addcmul(weight[k], q.sub_(zero), scale, value=-1, out=errors[k])
                pending[k + 1 - start : last - start].addr_(root[k, k + 1 : last], errors[k])
            pending[last - start :] += root[first:last, last:end].t() @ errors[first:last]
            first = last
    return integers
