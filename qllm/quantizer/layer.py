"""Quantize the linears of one layer: what goes in is float32, what comes out runs in its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qllm.config import DEFAULT_ALGORITHM, ModelConfig, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear, linear_class
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.equalize import can_divide, dense_linear, divide_input, shared_channels
from qllm.models.layer import Block, PreNormLayer
from qllm.models.mlp import is_of_expert
from qllm.quant.algorithm import Algorithm, QuantizeOptions, TuningStart
from qllm.quant.algorithms import ALGORITHMS, SMOOTHQUANT
from qllm.quant.inputs import InputStats, output_error
from qllm.quant.rtn import row_pieces
from qllm.quantizer.hidden import HiddenStates

# Of sums of x x^T that are in memory together; a larger one is alone.
OBSERVED_BYTES = 1 << 30


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
        unseen: no token of the calibration reached it, an expert's, and its weights were rounded
            to nearest.
    """

    name: str
    spec: QuantSpec
    error: float
    of_output: bool
    channels: int
    damp: float = 0.0
    dead: int = 0
    unseen: bool = False

    def __str__(self) -> str:
        of = "outputs" if self.of_output else "weights"
        if self.unseen:
            of += "; no token of the calibration reached it, it is rounded to nearest"
        return f"{self.name}: relative error {self.error:.2%} of the {of}"


def algorithm_of(spec: QuantSpec) -> Algorithm:
    """What chooses the integers of a layer that is quantized so."""
    return SMOOTHQUANT if spec.kind.startswith("w8a8") else ALGORITHMS[spec.algorithm]


def is_tuned(spec: QuantSpec, options: QuantizeOptions) -> bool:
    """Whether a linear of this spec is tuned together with its layer."""
    return spec.kind == "weight_only" and algorithm_of(spec).tunes(options)


def needs_inputs(spec: QuantSpec) -> bool:
    """Whether a spec cannot do without calibration."""
    return ALGORITHMS[spec.algorithm].calibrates or spec.kind == "w8a8_static"


def quantize_layer(
    layer: PreNormLayer,
    config: ModelConfig,
    name: str,
    specs: Mapping[str, QuantSpec],
    hidden: HiddenStates,
    options: QuantizeOptions,
    *,
    advance: slice,
    finished: Callable[[LinearReport], object],
    add: Callable[[float], object],
    starts: dict[str, TuningStart] | None = None,
    block: tuple[Block, Sequence[str]] | None = None,
) -> dict[str, Linear]:
    """Quantize a layer whose linears are dense and float32; each is replaced by what it became.

    Args:
        name: the layer's, "layers.0".
        specs: spec of each linear by its name in the layer, such as "attention.qkv".
        hidden: the states in front of what is quantized.
        advance: the samples whose states to leave behind it; the others' are where they
            happen to be.
        finished: called with what became of each linear, when it is quantized.
        add: called with shares of the work as they are done, which sum up to 1: a linear counts
            as much as the samples on their way through a half of the layer.
        starts: takes what tuning is to start from, by the names of the linears to tune.
        block: the one of the layer's that is quantized; None: all.

    Returns:
        the quantized linears by their names in the layer, whose other tensors may have changed.
    """
    halves = (block,) if block else layer.blocks()
    names = [linear for _, linears in halves for linear in linears]
    quantized = [linear for linear in names if specs[linear].kind != "dense"]
    late = [n for n in quantized if algorithm_of(specs[n]).sequential(options)]
    early = [linear for linear in quantized if linear not in late]
    moving = []  # through each half
    for half, _ in enumerate(halves):
        needed = any(linear in late for _, others in halves[half + 1 :] for linear in others)
        moving.append(hidden.part(slice(None) if needed else advance))
    moves = sum(bool(len(part.states)) for part in moving)
    together = [_observed_together(layer, members, specs) for _, members in halves]
    runs = [run for half in together for run in half]
    passes = bool(early) + sum(any(linear in late for linear in run) for run in runs)
    steps = passes + len(quantized) + moves
    if not steps:
        add(1.0)
    hidden.passed = lambda share: add(share / steps)
    stats: dict[str, InputStats] = {}
    if early:
        products = {linear for linear in early if algorithm_of(specs[linear]).products}
        modules = {linear: dense_linear(layer, linear) for linear in early}
        stats = hidden.observe(block[0] if block else layer, modules, products, name)
        for linear in early:
            _equalize(layer, config, linear, specs[linear], stats[linear], options)
    linears: dict[str, Linear] = {}
    for half, (run, _) in enumerate(halves):
        for members in together[half]:
            watched = {n: dense_linear(layer, n) for n in members if n in late}
            if watched:
                products = {n for n in watched if algorithm_of(specs[n]).products}
                stats |= hidden.observe(run, watched, products, name)
            for linear in members:
                if linear not in quantized:
                    continue
                module, spec, seen = dense_linear(layer, linear), specs[linear], stats.pop(linear)
                found, report = quantize_linear(module, f"{name}.{linear}", spec, seen, options)
                if starts is not None and is_tuned(spec, options):
                    form = (spec.bits, spec.group_size, spec.scheme)
                    algorithm = algorithm_of(spec)
                    starts[linear] = algorithm.tuning_start(module.weight, form, seen, options)
                linears[linear] = found
                finished(report)
                add(1 / steps)
                layer.set_submodule(linear, stand_in(found))
        if len(moving[half].states):
            moving[half].passed = hidden.passed
            moving[half].advance(run)
    return linears


def observed_bytes(
    layer: PreNormLayer, specs: Mapping[str, QuantSpec], options: QuantizeOptions
) -> int:
    """Bytes of the sums of x x^T that are in memory together while a layer is quantized.

    Args:
        layer: its linears may be on the meta device.
        specs, options: as for `quantize_layer`.
    """
    early, late = 0, [0]
    for _, members in layer.blocks():
        for run in _observed_together(layer, members, specs):
            sizes = [(linear, _products_bytes(layer, linear, specs[linear])) for linear in run]
            sequential = {n: algorithm_of(specs[n]).sequential(options) for n in run}
            early += sum(size for linear, size in sizes if not sequential[linear])
            late.append(sum(size for linear, size in sizes if sequential[linear]))
    return early + max(late)


def _products_bytes(layer: PreNormLayer, linear: str, spec: QuantSpec) -> int:
    """Bytes of the sum of x x^T of a linear, where its algorithm asks for it."""
    if spec.kind == "dense" or not algorithm_of(spec).products:
        return 0
    return 4 * dense_linear(layer, linear).in_features ** 2


def _observed_together(
    layer: PreNormLayer, members: Sequence[str], specs: Mapping[str, QuantSpec]
) -> list[list[str]]:
    """Runs of the linears of a block whose inputs one pass over the states shows.

    A linear is behind those in front of it, and has a run of its own. Of a mixture of experts all
    first matrices take what is in front of the experts, and all second ones are behind those: as
    many go together as have sums of x x^T of OBSERVED_BYTES.
    """
    runs: list[list[str]] = []
    held, kind = 0, ""
    for linear in members:
        needed = _products_bytes(layer, linear, specs[linear])
        which = linear.rpartition(".")[2] if is_of_expert(linear) else linear
        if not runs or which != kind or held + needed > OBSERVED_BYTES:
            runs.append([])
            held, kind = 0, which
        runs[-1].append(linear)
        held += needed
    return runs


def stand_in(linear: Linear) -> Linear:
    """What computes for a quantized linear in calibration: its matrix in float32, where it is one.

    Dequantized once, and not on every pass.
    """
    if not isinstance(linear, WeightOnlyLinear):
        linear.process_weights_after_loading()
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
    """Divide a linear's input as its algorithm would, where something can take it."""
    if not can_divide(config, linear) or not stats.count:
        return
    weight, form = dense_linear(layer, linear).weight, (spec.bits, spec.group_size, spec.scheme)
    share = partial(shared_channels, config, linear)
    scales = algorithm_of(spec).input_scales(weight, stats, form, options, share)
    if scales is not None:
        divide_input(layer, config, linear, scales)
        stats.divide(scales)


def quantize_linear(
    module: DenseLinear,
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
    unseen = stats is not None and not stats.count  # an expert that no token chose
    hessian = None if stats is None or unseen else stats.hessian
    form = (spec.bits, spec.group_size, spec.scheme)
    damp = 0.0
    if spec.kind != "weight_only":
        largest = None if stats is None else stats.largest.max().item()
        if unseen and spec.kind == "w8a8_static":
            raise UserError(
                f"no token of the calibration reaches {name}, so that the range of its inputs is "
                "not known; take more text, or `bitwidth` 8:tc-li"
            )
        linear: Linear = linear_class(spec).from_float(weight, bias, spec, input_range=largest)
    else:
        algorithm = ALGORITHMS[DEFAULT_ALGORITHM] if unseen else algorithm_of(spec)
        packed, damp = algorithm.quantize(
            weight, form, hessian, options, in_scores=name.endswith("attention.qkv")
        )
        linear = WeightOnlyLinear.from_packed(packed, bias, spec, module.in_features)
    error = _relative_error(linear, weight, hessian)
    dead = 0 if stats is None or unseen else int((stats.largest == 0).sum())
    of_output, columns = hessian is not None, module.in_features
    return linear, LinearReport(name, spec, error, of_output, columns, damp, dead, unseen)


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
