"""Bring the last linear of a tuned block nearer to what the float layer puts out, over all samples.

What it puts out is added to the rest, so that the block's squared error is quadratic in its weight,
and sums over all tokens say all of it. Steps of tuning see a few samples each, and move no integer
by more than one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.equalize import dense_linear
from qllm.models.layer import Block, PreNormLayer
from qllm.quant.descent import descend
from qllm.quant.inputs import InputStats
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.tune import token_sizes, tuned_samples, work_dtype


def descend_last(
    layer: PreNormLayer,
    run: Block,
    name: str,
    linear: WeightOnlyLinear,
    states: tuple[HiddenStates, HiddenStates],
    metric: Tensor,
) -> WeightOnlyLinear:
    """Other integers and scales for a linear of a layer whose blocks `blocks_end_in_sums`.

    Tokens count as in `token_errors`; samples that are held out do not.

    Args:
        layer: its linears are matrices in float32, and stay.
        run: the block of the layer that the linear is in.
        name: the linear's in the layer, where there is its matrix.
        linear: on its grids.
        states: those in front of the block, and those wanted behind it.
        metric: as of `token_errors`.
    """
    inputs, targets = (each.part(slice(tuned_samples(len(each.states)))) for each in states)
    module = dense_linear(layer, name)
    dtype = work_dtype(inputs.states.device, linear.spec.bits)

    def multiply(a: Tensor, b: Tensor, _: None) -> Tensor:
        return (a.to(dtype) @ b.to(dtype).t()).float()

    stats = InputStats(module.in_features, inputs.states.device, products=True, multiply=multiply)
    residuals = torch.zeros_like(module.weight)
    seen: list[Tensor] = []

    def see(_: nn.Module, given: tuple[Tensor]) -> None:
        seen.append(given[0])

    hook = module.register_forward_pre_hook(see)
    try:
        for (_, x, step), (_, wanted, _) in zip(inputs.passes(), targets.passes(), strict=True):
            missing = wanted - run(x, step)
            weight = token_sizes(wanted)[:, None].rsqrt_()
            given = seen.pop() * weight
            stats.add(given)
            residuals += multiply(missing.mul_(weight).t(), given.t(), None)
    finally:
        hook.remove()
    products = stats.hessian
    assert products is not None
    spec = linear.spec
    packed = descend(linear.packed, spec.bits, spec.group_size, products, residuals, metric)
    return WeightOnlyLinear.from_packed(packed, linear.bias, spec, linear.in_features)
