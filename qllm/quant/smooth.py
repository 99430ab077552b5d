"""SmoothQuant (Xiao et al. 2023): shift the difficulty of activations into the weights.

Input channel j of a linear is divided by s_j and column j of its weight multiplied by it, so the
product stays the same while an outlier channel no longer sets every token's int8 scale. The
division costs nothing where a norm in front of the linear takes it into its own weights.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qllm.quant.algorithm import DEFAULT_ALPHA, Form, QuantizeOptions
from qllm.quant.inputs import InputStats
from qllm.quant.nearest import RTN


class SmoothQuant(RTN):
    """What goes in front of rounding to int8, where there are statistics of the inputs."""

    name = "smoothquant"
    settings = ("smooth_alpha",)
    divides_inputs = True

    def input_scales(
        self,
        weight: Tensor,
        stats: InputStats,
        form: Form,
        options: QuantizeOptions,
        share: Callable[[Tensor], Tensor],
    ) -> Tensor:
        return share(smooth_scales(stats.largest, weight, options.smooth_alpha))


def smooth_scales(input_absmax: Tensor, weight: Tensor, alpha: float = DEFAULT_ALPHA) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), and 1 for a channel that is dead on a side.

    Args:
        input_absmax: largest |x| of each input channel, (K,).
        weight: (N, K).
        alpha: share of the difficulty that moves into the weights.

    Returns:
        float32 (K,).
    """
    weight_absmax = weight.abs().amax(dim=0).float()
    inputs = input_absmax.float().to(weight.device)
    scales = inputs**alpha / weight_absmax.clamp(min=1e-30) ** (1 - alpha)
    return scales.masked_fill((inputs == 0) | (weight_absmax == 0), 1.0)
