"""What improves on layers that were quantized: each layer tuned, and all scales behind them.

A layer stays as it was where tuning made it no better, and so do the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qllm.checkpoint.load import load_model
from qllm.checkpoint.tensor_files import SafetensorsFile
from qllm.checkpoint.tensors import TensorInfo
from qllm.checkpoint.writer import SafetensorsWriter, new_file
from qllm.config import ModelConfig, QuantPlan, QuantSpec
from qllm.layers import Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.memory import available_bytes, gigabytes
from qllm.models import Decoder
from qllm.models.equalize import dense_linear
from qllm.models.layer import PreNormLayer
from qllm.quant.algorithm import QuantizeOptions, TuningStart
from qllm.quantizer.descend import LAST, descend_last
from qllm.quantizer.distill import memory_needed, tune_scales
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.job import Job
from qllm.quantizer.layer import LinearReport, is_tuned, quantize_layer, stand_in
from qllm.quantizer.output import OutputCheckpoint
from qllm.quantizer.tune import (
    TuneReport,
    advance_watched,
    held_out,
    relative_error,
    tune_layer,
)


@dataclass(frozen=True)
class RefinedLayer:
    """A layer that was quantized and tuned.

    Attributes:
        linears: by their names in the layer, those that are better.
        reports: what became of each linear.
        tuning: what tuning did.
    """

    linears: dict[str, Linear]
    reports: list[LinearReport]
    tuning: TuneReport


def refine_layer(
    layer: PreNormLayer,
    config: ModelConfig,
    name: str,
    specs: Mapping[str, QuantSpec],
    states: tuple[HiddenStates, HiddenStates],
    options: QuantizeOptions,
    add: Callable[[float], object],
) -> RefinedLayer:
    """Quantize the linears of a layer, then tune them together.

    Args:
        layer, config, name, specs, options: as for `quantize_layer`.
        states: those in front of the layer, which are behind it in the end, and those of the float
            model, likewise.
        add: called with shares of the work as they are done, which sum up to 1.
    """
    hidden, targets = states
    targets.advance(layer)  # while it is the float model's
    tune, judges = options.tune, held_out(len(hidden.states))
    weights = {
        inner: dense_linear(layer, inner).weight
        for inner, spec in specs.items()
        if is_tuned(spec, options)
    }
    # Passes of a sample through the layer: gradients take two more, GPTQ about four in all.
    tuning = 3 * tune.steps * tune.samples(*hidden.states.shape[1:])
    share = tuning / (tuning + 4 * len(hidden.states))
    reports: list[LinearReport] = []
    starts: dict[str, TuningStart] = {}
    untuned_states = hidden.copy()
    found = quantize_layer(
        layer,
        config,
        name,
        specs,
        untuned_states,
        options,
        advance=judges,
        finished=reports.append,
        add=lambda done: add((1 - share) * done),
        starts=starts,
    )
    before = relative_error(untuned_states.part(judges), targets.part(judges))
    del untuned_states
    stand_ins = {inner: layer.get_submodule(inner) for inner in specs}
    untuned: dict[str, tuple[TuningStart, WeightOnlyLinear]] = {}
    for inner in weights:
        linear = found[inner]
        assert isinstance(linear, WeightOnlyLinear)
        untuned[inner] = starts[inner], linear
    tuned = tune_layer(layer, untuned, (hidden, targets), tune, lambda done: add(share * done))
    for inner, module in stand_ins.items():
        layer.set_submodule(inner, stand_in(tuned[inner]) if inner in tuned else module)

    def judged() -> tuple[float, dict[str, float]]:
        """How far the layer is from the float one where nothing was tuned, and its linears."""
        states = hidden.part(judges).copy()
        errors = advance_watched(states, layer, weights)
        return relative_error(states, targets.part(judges)), errors

    after, errors = judged()
    report = TuneReport(name, before, after)
    if report.gained:
        if LAST in tuned and layer.ends_in_sum:
            stood_in = layer.get_submodule(LAST)
            descended = descend_last(layer, tuned[LAST], (hidden, targets))
            layer.set_submodule(LAST, stand_in(descended))
            lower, with_it = judged()
            if lower < after:
                tuned[LAST], errors = descended, with_it
                report = replace(report, after=lower, descended=True)
            else:
                layer.set_submodule(LAST, stood_in)
        found |= tuned
        for index, entry in enumerate(reports):
            inner = entry.name.removeprefix(f"{name}.")
            if inner in tuned:
                reports[index] = replace(entry, error=errors[inner], of_output=True)
    else:
        for inner, module in stand_ins.items():
            layer.set_submodule(inner, module)
    hidden.advance(layer)
    return RefinedLayer(found, reports, report)


def can_refine_scales(
    job: Job,
    config: ModelConfig,
    specs: Mapping[str, QuantSpec],
    dtype: torch.dtype,
    note: Callable[[str], object],
) -> bool:
    """Whether the scales of a job with tuned layers are tuned, too; says why where they are not.

    Args:
        specs: of each linear.
        dtype: of the quantized model's activations.
        note: called with a line where scales are not tuned though they were to be.
    """
    if not job.options.distill.steps:
        return False
    if job.fake:
        note("scales are not tuned with --fake, whose weights have none")
        return False
    assert job.samples is not None  # without which no layer is tuned
    needed = memory_needed(
        Decoder(config, specs, dtype), len(job.samples), len(job.samples[0]), job.options.distill
    )
    available = available_bytes(job.device)
    if needed > available:
        note(
            f"scales are not tuned: it takes {gigabytes(needed)} of memory, and "
            f"{gigabytes(available)} are free on {job.device}"
        )
    return needed <= available


def refine_scales(
    output: OutputCheckpoint,
    target: Path,
    job: Job,
    targets: Tensor,
    float_head: Tensor | None,
    dtype: torch.dtype,
    note: Callable[[str], object],
    add: Callable[[float], object],
) -> None:
    """Tune all scales of a quantized checkpoint, and write what is to take their place.

    Args:
        output: the checkpoint, all of which is on the disk.
        target: the file for the tensors that are to take the place of others; without any where
            none is better.
        targets: what the float model makes of the calibration samples, behind the last layer:
            (S, T, C), of which a batch is read at a time.
        float_head: the matrix of the float model's head, where the checkpoint's is quantized.
        dtype: of the quantized model's activations.
        note: called with a line on what it gained.
        add: called with shares of the work as they are done, which sum up to 1.
    """
    assert job.samples is not None
    plan = QuantPlan.uniform(QuantSpec())
    model = load_model(output.folder, plan, dtype=dtype, device=job.device)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, WeightOnlyLinear)}
    scales, before, after = tune_scales(
        model, job.samples, targets, float_head, job.options.distill, add
    )
    note(
        f"divergence from the float model over samples held out: {before:.3g}, {after:.3g} "
        f"with tuned scales{'' if scales else ', so that they stay as they were'}"
    )
    tensors: dict[str, Tensor] = {}
    for name, values in scales.items():
        spec, in_features = linears[name].spec, linears[name].in_features
        packed = linears[name].packed._replace(scales=values)
        linear = WeightOnlyLinear.from_packed(packed, None, spec, in_features)
        tensors |= output.scales_of(name, linear)
    infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    with new_file(target) as temporary:
        writer = SafetensorsWriter(temporary, infos, {})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.close()


def replace_scales(output: OutputCheckpoint, source: Path) -> None:
    """Write the tensors of a file of `refine_scales` over those of the checkpoint.

    A second call, of a run that was killed in the first, leaves the same.
    """
    file = SafetensorsFile(source)
    for name in file.tensors:
        output.writer.overwrite(name, file.read(name))
