"""What improves on layers that were quantized: each layer tuned, and all scales behind them.

A layer stays as it was where tuning made it no better, and so do the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from qllm.models.layer import Block, PreNormLayer
from qllm.progress import Note
from qllm.quant.algorithm import QuantizeOptions, TuningStart
from qllm.quantizer.descent import descend_last
from qllm.quantizer.distill import memory_needed, tune_scales
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.job import Job
from qllm.quantizer.layer import LinearReport, is_tuned, quantize_layer, stand_in
from qllm.quantizer.output import OutputCheckpoint
from qllm.quantizer.tune import (
    TuneReport,
    advance_watched,
    held_out,
    multiplying_in,
    relative_error,
    tune_block,
    work_dtype,
)

# What a block adds to the rest of the states.
SUMMANDS = ("attention.out", "mlp.down")


@dataclass(frozen=True)
class Refined:
    """A layer, or a block of one, that was quantized and tuned.

    Attributes:
        linears: by their names in the layer.
        reports: what became of each linear.
        tuning: what tuning did to each block.
    """

    linears: dict[str, Linear]
    reports: list[LinearReport]
    tuning: list[TuneReport]


def refine_layer(
    layer: PreNormLayer,
    config: ModelConfig,
    name: str,
    specs: Mapping[str, QuantSpec],
    states: tuple[HiddenStates, HiddenStates],
    metrics: Sequence[Tensor],
    options: QuantizeOptions,
    add: Callable[[float], object],
) -> Refined:
    """Quantize a layer block by block, and tune the linears of each together.

    Args:
        layer, config, name, specs, options: as for `quantize_layer`.
        states: those in front of the layer, which are behind it in the end, and those of the float
            model, likewise.
        metrics: of errors behind each block, as of `token_errors`.
        add: called with shares of the work as they are done, which sum up to 1.
    """
    refined = Refined({}, [], [])
    blocks = layer.blocks()
    for block, metric in zip(blocks, metrics, strict=True):
        one = _Block(layer, config, name, block, specs, states, metric, options)
        found = one.refine(lambda done: add(done / len(blocks)))
        refined.linears.update(found.linears)
        refined.reports.extend(found.reports)
        refined.tuning.extend(found.tuning)
    return refined


class _Block:
    """One block of `refine_layer`.

    Attributes:
        dtype: what products are computed in, but those of quantizing, which are GPTQ's.
    """

    def __init__(
        self,
        layer: PreNormLayer,
        config: ModelConfig,
        name: str,
        block: tuple[Block, Sequence[str]],
        specs: Mapping[str, QuantSpec],
        states: tuple[HiddenStates, HiddenStates],
        metric: Tensor,
        options: QuantizeOptions,
    ) -> None:
        self.layer, self.config, self.name = layer, config, name
        self.run, names = self.block = block
        self.specs = {inner: specs[inner] for inner in names}
        parts = {inner.split(".")[0] for inner in names}
        self.title = f"{name}.{parts.pop()}" if len(parts) == 1 else name
        self.states, self.metric, self.options = states, metric, options
        self.weights = {
            inner: dense_linear(layer, inner).weight
            for inner, spec in self.specs.items()
            if is_tuned(spec, options)
        }
        bits = [self.specs[inner].bits for inner in self.weights]
        device = states[0].states.device
        self.dtype = work_dtype(device, max(bits)) if bits else torch.float32

    def refine(self, add: Callable[[float], object]) -> Refined:
        """All of it; the states are behind the block then."""
        hidden, targets = self.states
        with multiplying_in(self.dtype, self.layer, self.specs):
            targets.advance(self.run)  # while it is the float model's
        # Passes of a sample: gradients take two more, GPTQ about four in all.
        tune = self.options.tune
        tuning = 3 * tune.steps * tune.samples(*hidden.states.shape[1:])
        share = tuning / (tuning + 4 * len(hidden.states)) if self.weights else 0.0
        starts: dict[str, TuningStart] = {}
        refined, before = self._quantize(starts, lambda done: add((1 - share) * done))
        if self.weights:
            self._tune(refined, starts, before, lambda done: add(share * done))
        hidden.advance(self.run)
        return refined

    def _quantize(
        self, starts: dict[str, TuningStart], add: Callable[[float], object]
    ) -> tuple[Refined, float]:
        """What there is to tune, and its error."""
        hidden, targets = self.states
        judges = held_out(len(hidden.states))
        refined, states = Refined({}, [], []), hidden.copy()
        found = quantize_layer(
            self.layer,
            self.config,
            self.name,
            self.specs,
            states,
            self.options,
            advance=judges,
            finished=refined.reports.append,
            add=add,
            starts=starts,
            block=self.block,
        )
        refined.linears.update(found)
        return refined, relative_error(states.part(judges), targets.part(judges), self.metric)

    def _tune(
        self,
        refined: Refined,
        starts: Mapping[str, TuningStart],
        before: float,
        add: Callable[[float], object],
    ) -> None:
        """Put what tuning found in the place of what there was, where it is better."""
        layer = self.layer
        untuned: dict[str, tuple[TuningStart, WeightOnlyLinear]] = {}
        for inner in self.weights:
            linear = refined.linears[inner]
            assert isinstance(linear, WeightOnlyLinear)
            untuned[inner] = starts[inner], linear
        stand_ins = {inner: layer.get_submodule(inner) for inner in self.specs}
        tuned = tune_block(
            layer,
            self.block,
            untuned,
            self.states,
            self.metric,
            self.dtype,
            self.options.tune,
            add,
        )
        for inner, module in stand_ins.items():
            layer.set_submodule(inner, stand_in(tuned[inner]) if inner in tuned else module)
        after, errors = self._judge()
        report = TuneReport(self.title, before, after, min(before, after))
        better = dict(tuned)
        if not report.gained:
            better = {}
            for inner, module in stand_ins.items():
                layer.set_submodule(inner, module)
        for inner in SUMMANDS if layer.blocks_end_in_sums else ():
            if inner not in untuned:
                continue
            stood_in, linear = layer.get_submodule(inner), better.get(inner, untuned[inner][1])
            descended = descend_last(
                layer, self.block, inner, linear, self.states, self.metric, self.dtype
            )
            layer.set_submodule(inner, stand_in(descended))
            lower, with_it = self._judge()
            if lower < report.after:
                better[inner], errors = descended, with_it
                report = replace(report, after=lower, descended=[*report.descended, inner])
            else:
                layer.set_submodule(inner, stood_in)
        refined.linears.update(better)
        for index, entry in enumerate(refined.reports):
            inner = entry.name.removeprefix(f"{self.name}.")
            if inner in better:
                refined.reports[index] = replace(entry, error=errors[inner], of_output=True)
        refined.tuning.append(report)

    def _judge(self) -> tuple[float, dict[str, float]]:
        """How far the block is from the float one where nothing was tuned, and its linears."""
        hidden, targets = self.states
        judges = held_out(len(hidden.states))
        states = hidden.part(judges).copy()
        errors = advance_watched(states, self.layer, self.block, self.weights, self.dtype)
        return relative_error(states, targets.part(judges), self.metric), errors


def can_refine_scales(
    job: Job,
    config: ModelConfig,
    specs: Mapping[str, QuantSpec],
    dtype: torch.dtype,
    note: Note,
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
        note("scales are not tuned with `fake`, whose weights have none")
        return False
    assert job.samples is not None  # without which no layer is tuned
    needed = memory_needed(
        Decoder(config, specs, dtype),
        len(job.samples),
        len(job.samples[0]),
        job.options.distill,
        torch.device(job.device),
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
    note: Note,
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
