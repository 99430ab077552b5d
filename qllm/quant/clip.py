"""Search of the clipping range: a grid that leaves its group's largest weights out.

A narrower grid has finer steps: the few weights beyond its ends lose, the many inside win. Each
group takes the range, among shrunk ones, that makes the error least: of the weights (as the `mse`
option of GPTQ's implementations), or of the outputs for the inputs seen (as AWQ, Lin et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qllm.quant.packing import group_width
from qllm.quant.rtn import (
    FindQParams,
    fake_quantize,
    group_qparams,
    grouped,
    minmax_qparams,
    round_trip,
    row_pieces,
    zero_points,
)

# Shares of the full range that are tried.
SHRINK = tuple(1 - 0.05 * i for i in range(15))


def clipped_qparams(
    weight: Tensor, bits: int, group_size: int, scheme: str
) -> tuple[Tensor, Tensor]:
    """Scales and least values (N, G) of groups of weights (N, K), least in squared weight error."""
    return _search(weight, bits, group_size, scheme, None)


def clipped_qparams_for(hessian: Tensor) -> FindQParams:
    """The search for the least squared output error, group by group.

    What a group's channels have in common with those of other groups does not enter; clipped
    weights all err towards zero, and may add up. So a row whose output is better without stays so.

    Args:
        hessian: float32 (K, K), the sum of x x^T over inputs x.
    """

    def search(weight: Tensor, bits: int, group_size: int, scheme: str) -> tuple[Tensor, Tensor]:
        form = (bits, group_size, scheme)
        clipped, full = _search(weight, *form, hessian), minmax_qparams(weight, *form)
        for rows in row_pieces(weight):
            losses = [
                _row_losses(weight[rows], *form, (scales[rows], min_vals[rows]), hessian)
                for scales, min_vals in (clipped, full)
            ]
            worse = (losses[0] >= losses[1])[:, None]
            for ours, theirs in zip(clipped, full, strict=True):
                ours[rows] = torch.where(worse, theirs[rows], ours[rows])
        return clipped

    return search


def clipped_qparams_by_channel(squares: Tensor) -> FindQParams:
    """The search for the least squared error of the weights, weighted by their inputs' squares.

    Each end of a range is searched on its own, which pays where roundings are tuned behind it:
    one that is shrunk for nothing can no longer be widened much.

    Args:
        squares: (K,), the mean square of each input channel, or the sum.
    """

    def search(weight: Tensor, bits: int, group_size: int, scheme: str) -> tuple[Tensor, Tensor]:
        group = group_width(weight.shape[1], group_size)
        importance = grouped(squares[None].float(), group)  # (1, G, g)
        found = [
            _search_ends(grouped(weight[p], group).float(), importance, bits, scheme)
            for p in row_pieces(weight)
        ]
        scales, min_vals = zip(*found, strict=True)
        return torch.cat(scales), torch.cat(min_vals)

    return search


def _search_ends(
    groups: Tensor, importance: Tensor, bits: int, scheme: str
) -> tuple[Tensor, Tensor]:
    """Scales and least values of groups (n, G, g): both ends shrunk together, then each one."""
    full_scale, full_min_vals = group_qparams(groups, bits, scheme)
    full_high = full_min_vals + full_scale * (2**bits - 1)
    best_low, best_high = torch.ones_like(full_min_vals), torch.ones_like(full_min_vals)
    smallest_loss = torch.full_like(full_min_vals, torch.inf)
    together = [(True, True)]
    for low_too, high_too in (
        together if scheme == "sym" else [*together, (True, False), (False, True)]
    ):
        start_low, start_high = best_low, best_high
        for share in SHRINK:
            shares = torch.full_like(smallest_loss, share)
            low_share = shares if low_too else start_low
            high_share = shares if high_too else start_high
            low = full_min_vals * low_share
            scale = (full_high * high_share - low) / (2**bits - 1)
            scale = torch.where(scale <= 0, 1.0, scale)
            if scheme == "sym":
                scale = full_scale * share
            zero = zero_points(low, scale, bits, scheme)
            error = round_trip(groups, scale, zero, bits).sub_(groups)
            loss = error.square_().mul_(importance).sum(-1)
            better = loss < smallest_loss
            smallest_loss = torch.where(better, loss, smallest_loss)
            best_low = torch.where(better, low_share, best_low)
            best_high = torch.where(better, high_share, best_high)
    if scheme == "sym":
        return full_scale * best_low, full_min_vals * best_low
    low = full_min_vals * best_low
    scale = (full_high * best_high - low) / (2**bits - 1)
    return torch.where(scale <= 0, 1.0, scale), low


def _row_losses(
    weight: Tensor,
    bits: int,
    group_size: int,
    scheme: str,
    qparams: tuple[Tensor, Tensor],
    hessian: Tensor,
) -> Tensor:
    """The squared output error of rows (n, K) on the grids of `qparams`, as stored: (n,)."""
    error = fake_quantize(weight, bits, group_size, scheme, lambda *_: qparams)
    error = error.sub_(weight.float())
    return (error @ hessian).mul_(error).sum(dim=1)


def _search(
    weight: Tensor, bits: int, group_size: int, scheme: str, hessian: Tensor | None
) -> tuple[Tensor, Tensor]:
    group = group_width(weight.shape[1], group_size)
    blocks = None if hessian is None else _diagonal_blocks(hessian, group)
    found = [_search_rows(weight[p], bits, group, scheme, blocks) for p in row_pieces(weight)]
    scales, min_vals = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(min_vals)


def _search_rows(
    weight: Tensor, bits: int, group: int, scheme: str, blocks: Tensor | None
) -> tuple[Tensor, Tensor]:
    groups = grouped(weight, group).float()  # (n, G, g)
    full_scale, full_min_vals = group_qparams(groups, bits, scheme)
    best_scale, best_low = full_scale, full_min_vals
    smallest_loss = torch.full_like(full_scale, torch.inf)
    for share in SHRINK:
        scale, low = full_scale * share, full_min_vals * share
        zero = zero_points(low, scale, bits, scheme)
        error = round_trip(groups, scale, zero, bits).sub_(groups)
        if blocks is None:
            loss = error.square().sum(-1)
        else:
            by_group = error.transpose(0, 1)  # (G, n, g)
            loss = (by_group @ blocks).mul_(by_group).sum(-1).t()
        better = loss < smallest_loss
        smallest_loss = torch.where(better, loss, smallest_loss)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, low, best_low)
    return best_scale, best_low


def _diagonal_blocks(hessian: Tensor, group: int) -> Tensor:
    """The (g, g) blocks on the diagonal of (K, K): (G, g, g); a last, shorter one is padded."""
    columns = len(hessian)
    blocks = hessian.new_zeros(-(-columns // group), group, group)
    for index, start in enumerate(range(0, columns, group)):
        span = slice(start, min(start + group, columns))
        size = span.stop - start
        blocks[index, :size, :size] = hessian[span, span]
    return blocks
