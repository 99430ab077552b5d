"""Quantize the linears of one layer: what goes in is float32, what comes out runs in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qllm.config import ModelConfig, QuantSpec
from qllm.layers import Linear, linear_class
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.equalize import can_divide, divide_input, shared_channels
from qllm.models.layer import PreNormLayer
from qllm.quant.awq import search_scales
from qllm.quant.clip import clip_ranges, clip_ranges_for
from qllm.quant.gptq import GPTQOptions, quantize_gptq
from qllm.quant.inputs import InputStats, output_error
from qllm.quant.rtn import Ranges, group_ranges, quantize_rtn, row_pieces
from qllm.quant.smooth import DEFAULT_ALPHA, smooth_scales
from qllm.quantizer.hidden import HiddenStates


@dataclass(frozen=True)
class QuantizeOptions:
    """How the algorithms go about it.

    Attributes:
        gptq: GPTQ's own.
        true_sequential: GPTQ sees the inputs that the layer's quantized linears in front of a
            linear give it; else those of the float layer.
        clip: search the clipping range; None is yes for AWQ, no for the others.
        smooth_alpha: SmoothQuant's share of the difficulty that moves into the weights.
    """

    gptq: GPTQOptions = field(default_factory=GPTQOptions)
    true_sequential: bool = True
    clip: bool | None = None
    smooth_alpha: float = DEFAULT_ALPHA


@dataclass(frozen=True)
class LinearReport:
    """What became of one linear.

    Attributes:
        error: relative root mean square error of its output over the calibration inputs, or of
            its weights where there were none.
        of_output: which of the two.
        damp: the damping that GPTQ took, 0 for other algorithms.
        channels: input channels.
        dead: those of them that were zero in all of the calibration.
    """

    name: str
    spec: QuantSpec
    error: float
    of_output: bool
    channels: int
    damp: float = 0.0
    dead: int = 0


def needs_inputs(spec: QuantSpec) -> bool:
    """Whether a spec cannot do without calibration."""
    return spec.algorithm != "rtn" or spec.kind == "w8a8_static"


def quantize_layer(
    layer: PreNormLayer,
    config: ModelConfig,
    name: str,
    specs: Mapping[str, QuantSpec],
    hidden: HiddenStates,
    options: QuantizeOptions,
    *,
    advance: bool,
    finished: Callable[[LinearReport], object],
    add: Callable[[float], object],
) -> dict[str, Linear]:
    """Quantize a layer whose linears are dense and float32; each is replaced by what it became.

    Args:
        name: the layer's, "layers.0".
        specs: spec of each linear by its name in the layer, such as "attention.qkv".
        hidden: the states in front of the layer.
        advance: leave the states behind the layer; else where they happen to be.
        finished: called with what became of each linear, when it is quantized.
        add: called with shares of the work as they are done, which sum up to 1: a linear counts
            as much as the samples on their way through a half of the layer.

    Returns:
        the quantized linears by their names in the layer, whose other tensors may have changed.
    """
    halves = layer.blocks()
    names = [linear for _, linears in halves for linear in linears]
    quantized = [linear for linear in names if specs[linear].kind != "dense"]
    late = [n for n in quantized if specs[n].algorithm == "gptq" and options.true_sequential]
    early = [linear for linear in quantized if linear not in late]
    moving = [
        half
        for half, _ in enumerate(halves)
        if advance or any(linear in late for _, others in halves[half + 1 :] for linear in others)
    ]
    steps = len(late) + bool(early) + len(quantized) + len(moving)
    if not steps:
        add(1.0)
    hidden.passed = lambda share: add(share / steps)
    stats: dict[str, InputStats] = {}
    if early:
        products = {linear for linear in early if specs[linear].algorithm != "rtn"}
        modules = {linear: layer.get_submodule(linear) for linear in early}
        stats = hidden.observe(layer, modules, products, name)
        for linear in early:
            _equalize(layer, config, linear, specs[linear], stats[linear], options)
    linears = {}
    for half, (run, members) in enumerate(halves):
        for linear in members:
            if linear not in quantized:
                continue
            module = layer.get_submodule(linear)
            if linear in late:
                stats |= hidden.observe(run, {linear: module}, {linear}, name)
            found, report = quantize_linear(
                module, f"{name}.{linear}", specs[linear], stats.pop(linear), options
            )
            linears[linear] = found
            finished(report)
            add(1 / steps)
            layer.set_submodule(linear, _stand_in(found))
        if half in moving:
            hidden.advance(run)
    return linears


def _stand_in(linear: Linear) -> Linear:
    """What computes for a quantized linear in calibration: its matrix in float32, where it is one.

    Dequantized once, and not on every pass.
    """
    if not isinstance(linear, WeightOnlyLinear):
        return linear
    return DenseLinear(linear.dequantize(), linear.bias, QuantSpec())


def _equalize(
    layer: PreNormLayer,
    config: ModelConfig,
    linear: str,
    spec: QuantSpec,
    stats: InputStats,
    options: QuantizeOptions,
) -> None:
    """Divide a linear's input as AWQ or SmoothQuant would, where something can take it."""
    weight = layer.get_submodule(linear).weight
    if not can_divide(config, linear):
        return
    if spec.algorithm == "awq":
        means = shared_channels(config, linear, stats.mean)
        form = (spec.bits, spec.group_size, spec.scheme)
        scales = search_scales(weight, means, stats.hessian, *form)
    elif spec.kind.startswith("w8a8"):
        scales = smooth_scales(stats.largest, weight, options.smooth_alpha)
        scales = shared_channels(config, linear, scales)
    else:
        return
    divide_input(layer, config, linear, scales)
    stats.divide(scales)


def quantize_linear(
    module: Linear,
    name: str,
    spec: QuantSpec,
    stats: InputStats | None,
    options: QuantizeOptions,
) -> tuple[Linear, LinearReport]:
    """A dense linear as `spec` says, and what became of it.

    Args:
        stats: of its inputs; None quantizes without calibration.

    Raises:
        UserError: where the spec needs calibration.
    """
    weight, bias = module.weight, module.bias
    hessian = None if stats is None else stats.hessian
    form = (spec.bits, spec.group_size, spec.scheme)
    damp = 0.0
    if spec.kind != "weight_only":
        largest = None if stats is None else stats.largest.max().item()
        linear = linear_class(spec).from_float(weight, bias, spec, input_range=largest)
    else:
        if spec.algorithm == "gptq":
            ranges = clip_ranges if options.clip else group_ranges
            packed, damp = quantize_gptq(weight, hessian, *form, options.gptq, ranges)
        else:
            packed = quantize_rtn(weight, *form, _ranges(name, spec, hessian, options))
        linear = WeightOnlyLinear.from_packed(packed, bias, spec, module.in_features)
    error = _relative_error(linear, weight, hessian)
    dead = 0 if stats is None else int((stats.largest == 0).sum())
    of_output = hessian is not None
    return linear, LinearReport(name, spec, error, of_output, module.in_features, damp, dead)


def _ranges(name: str, spec: QuantSpec, hessian: Tensor | None, options: QuantizeOptions) -> Ranges:
    """How a linear that is rounded to nearest finds its grids."""
    if spec.algorithm == "awq" and options.clip is not False:
        # The scores of attention are no linear function of queries and keys: as in AWQ's own
        # code, what makes them is left as it is.
        return group_ranges if name.endswith("attention.qkv") else clip_ranges_for(hessian)
    return clip_ranges if options.clip else group_ranges


def _relative_error(linear: Linear, weight: Tensor, hessian: Tensor | None) -> float:
    """Root mean square error, of the outputs or else of the weights, over what they are."""
    squares = [0.0, 0.0]
    for rows in row_pieces(weight):
        part = weight[rows].float()
        error = linear.dequantize(rows).sub_(part)
        for index, value in enumerate((error, part)):
            if hessian is not None:
                squares[index] += output_error(value, hessian)
            else:
                squares[index] += torch.linalg.vector_norm(value).item() ** 2
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
