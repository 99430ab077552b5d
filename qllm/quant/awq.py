"""AWQ (Lin et al. 2024): scale up the weights of the input channels that matter most.

Input channel j is divided by s_j and column j of the weight multiplied by it, as in SmoothQuant;
a column that is scaled up loses less to rounding. With s = mean|x|^ratio, the ratio is searched
over a grid for the least squared error of the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qllm.quant.algorithm import Algorithm, Form, QuantizeOptions, yes
from qllm.quant.clip import clipped_qparams_for
from qllm.quant.inputs import InputStats, output_error
from qllm.quant.packing import PackedWeight
from qllm.quant.rtn import FindQParams, fake_quantize, minmax_qparams, quantize_rtn

# Ratios tried: 0, 1 / GRID, …, below 1.
GRID = 20
SMALLEST_INPUT = 1e-4
# Rows per piece: the temporaries are a few times as large.
ROWS = 2048


class AWQ(Algorithm):
    """See above; then each group is clipped for the least error of the outputs."""

    name = "awq"
    calibrates = products = divides_inputs = own_clipping = True

    def input_scales(
        self,
        weight: Tensor,
        stats: InputStats,
        form: Form,
        options: QuantizeOptions,
        share: Callable[[Tensor], Tensor],
    ) -> Tensor:
        assert stats.hessian is not None  # it needs inputs
        return search_scales(weight, share(stats.mean), stats.hessian, *form)

    def quantize(
        self,
        weight: Tensor,
        form: Form,
        hessian: Tensor | None,
        options: QuantizeOptions,
        *,
        in_scores: bool,
    ) -> tuple[PackedWeight, float]:
        # As in AWQ's own code, what makes the scores of attention is not clipped.
        plain = options.clip is False or in_scores
        find_qparams: FindQParams = minmax_qparams
        if not plain:
            assert hessian is not None  # it needs inputs
            find_qparams = clipped_qparams_for(hessian)
        return quantize_rtn(weight, *form, find_qparams), 0.0

    def describe(self, options: QuantizeOptions) -> str:
        return f"AWQ: scales searched, clipping {yes(options.clip is not False)}"


def search_scales(
    weight: Tensor,
    input_mean: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    scheme: str,
) -> Tensor:
    """The best s of a weight, float32 (K,); where no scaling is best, ones.

    Args:
        weight: (N, K).
        input_mean: mean |x| of each input channel, (K,). Equal entries get equal scales.
        hessian: float32 (K, K), the sum of x x^T over inputs x.
    """
    inputs = input_mean.float().clamp(min=SMALLEST_INPUT)
    best, smallest_loss = torch.ones_like(inputs), torch.inf
    for step in range(GRID):
        scales = inputs ** (step / GRID)
        scales = scales / (scales.max() * scales.min()).sqrt()
        loss = 0.0
        for rows in weight.split(ROWS):
            part = rows.float()
            error = fake_quantize(part * scales, bits, group_size, scheme).div_(scales).sub_(part)
            loss += output_error(error, hessian)
        if loss < smallest_loss:
            best, smallest_loss = scales, loss
    return best
