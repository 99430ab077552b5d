"""Bring a tuned layer's last linear nearer to what the float layer puts out, over all samples.

What the last linear puts out is added to the rest, so that the layer's squared error is quadratic
in its weight, and sums over all tokens say all of it. Steps of tuning see a few samples each, and
move no integer by more than one. Of attention's output the same made layers worse: what the MLP
makes of it is not linear, and was tuned for what it gets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.equalize import dense_linear
from qllm.models.layer import PreNormLayer
from qllm.quant.descent import descend
from qllm.quant.inputs import InputStats
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.tune import SMALLEST_SIZE, tuned_samples

# What a layer's result is the last linear of.
LAST = "mlp.down"


def descend_last(
    layer: PreNormLayer, linear: WeightOnlyLinear, states: tuple[HiddenStates, HiddenStates]
) -> WeightOnlyLinear:
    """Other integers and scales for the last linear of a layer that `ends_in_sum`.

    Tokens count as in `token_errors`; samples that are held out do not.

    Args:
        layer: its linears are matrices in float32, and stay; the last is `linear`'s.
        linear: on its grids.
        states: those in front of the layer, and those wanted behind it.
    """
    inputs, targets = (each.part(slice(tuned_samples(len(each.states)))) for each in states)
    module = dense_linear(layer, LAST)
    stats = InputStats(module.in_features, inputs.states.device, products=True, multiply=module.run)
    residuals = torch.zeros_like(module.weight)
    seen: list[Tensor] = []

    def see(_: nn.Module, given: tuple[Tensor]) -> None:
        seen.append(given[0])

    hook = module.register_forward_pre_hook(see)
    try:
        for (_, x, step), (_, wanted, _) in zip(inputs.passes(), targets.passes(), strict=True):
            missing = wanted - layer(x, step)
            weight = (wanted.square().mean(-1, keepdim=True) + SMALLEST_SIZE).rsqrt_()
            given = seen.pop() * weight
            stats.add(given)
            residuals.addmm_(missing.mul_(weight).t(), given)
    finally:
        hook.remove()
    products = stats.hessian
    assert products is not None
    spec = linear.spec
    packed = descend(linear.packed, spec.bits, spec.group_size, products, residuals)
    return WeightOnlyLinear.from_packed(packed, linear.bias, spec, linear.in_features)
