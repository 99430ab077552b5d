"""Quantize a checkpoint: one layer in memory at a time, and on from where a killed run was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qllm import __version__, ops
from qllm.checkpoint.fingerprint import state_fingerprint
from qllm.checkpoint.load import elements
from qllm.checkpoint.resume import PartialFolder
from qllm.checkpoint.tensor_files import SafetensorsFile
from qllm.checkpoint.weights import Weights
from qllm.config import EMBEDDING, LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.memory import check_fits
from qllm.models.embeddings import QuantizedEmbedding
from qllm.models.layer import PreNormLayer
from qllm.models.norms import Norm
from qllm.models.passes import Prefill
from qllm.progress import Meter, Note, silent, unseen
from qllm.quant.inputs import InputStats
from qllm.quantizer.estimate import bytes_needed, step_sizes
from qllm.quantizer.fisher import read_metric, seen_samples, write_fisher
from qllm.quantizer.floats import BACK, FRONT, LAYER_INPUTS, FloatModel, modules_of
from qllm.quantizer.hidden import HiddenStates, check_alone
from qllm.quantizer.job import Job
from qllm.quantizer.layer import (
    LinearReport,
    algorithm_of,
    is_tuned,
    needs_inputs,
    quantize_layer,
    quantize_linear,
)
from qllm.quantizer.output import OutputCheckpoint
from qllm.quantizer.refine import can_refine_scales, refine_layer, refine_scales, replace_scales
from qllm.quantizer.tune import TuneReport

# What a run keeps between two layers: the states behind the quantized ones, and the float ones.
HIDDEN, TARGETS = "hidden", "targets"
# How errors behind each block of a layer count, where layers are tuned.
FISHER = "fisher.bin"
# And behind all of them: the tensors that take the place of others, since scales were tuned.
SCALES = "scales.safetensors"


def quantize_checkpoint(
    job: Job,
    target: Path,
    meter: Meter = unseen,
    note: Note = silent,
) -> list[LinearReport]:
    """Write a quantized checkpoint to `target`, which appears when it is whole.

    A run that was killed is gone on with by the same call, from the last layer it finished, and
    gives the same bytes.

    Args:
        meter: counts the bytes of the layers that are quantized.
        note: called with a line for each linear, with where an interrupted run is gone on with,
            and on tensors that are not used.

    Returns:
        what became of each linear.

    Raises:
        UserError: for a checkpoint that is quantized or broken, a plan that does not fit it,
            calibration that is missing or not finite, or a target that is there.
    """
    run = _Run(job, target, note)
    try:
        return run.work(meter)
    finally:
        run.partial.close()


class _Run:
    """One call of `quantize_checkpoint`: what it knows before the first step, and the steps."""

    def __init__(self, job: Job, target: Path, note: Note) -> None:
        self.job, self.note = job, note
        self.weights = Weights.of_floats(job.source, note)
        self.config = self.weights.config
        linears = self.weights.family.layer_linears(self.config)
        job.plan.check(self.config)
        tied = self.config.tied_head
        self.specs = job.plan.resolve(linears, self.config.num_layers, tied=tied)
        if all(spec.kind == "dense" for spec in self.specs.values()):
            raise UserError(
                "every layer stays at 16 bits; name fewer with `bitwidth` or `QuantPlan.rules`"
            )
        needing = [name for name, spec in self.specs.items() if needs_inputs(spec)]
        if needing and job.samples is None:
            spec = self.specs[needing[0]]
            what = spec.algorithm if spec.kind == "weight_only" else spec.bitwidth
            raise UserError(f"{what} needs calibration text; name one with `dataset`")
        if self.tuning:
            check_alone(self.config, "tuning", "GPTQ and AWQ without it do")
        self.floats = FloatModel(self.weights, job.device)
        self.model = self.floats.model
        self.output = OutputCheckpoint(job, self.weights, self.specs, self.model)
        if job.samples is not None:
            dtype = self._states_dtype()
            needed = bytes_needed(job, self.model, self.specs, dtype, tuning=self.tuning)
            check_fits(needed, job.device, "calibration")
        self.partial = PartialFolder(target, self._settings())
        self.reports: list[LinearReport] = []
        self.tuned: list[TuneReport] = []
        self.hidden: HiddenStates | None = None
        # What the float model has there, where layers are tuned.
        self.targets: HiddenStates | None = None
        # Decided once: a run that is gone on with may find more memory or less.
        decided: bool | None = self.partial.state.get("distilling")
        self.distilling = self._can_refine_scales() if decided is None else decided

    @property
    def tuning(self) -> bool:
        """Whether any layer is tuned."""
        return any(is_tuned(spec, self.job.options) for spec in self.specs.values())

    def _states_dtype(self) -> torch.dtype:
        """What hidden states are kept in between layers."""
        return self.job.dtype or self.weights.default_dtype()

    def _can_refine_scales(self) -> bool:
        """Whether scales are tuned behind the layers."""
        dtype = self._states_dtype()
        return self.tuning and can_refine_scales(
            self.job, self.config, self.specs, dtype, self.note
        )

    def _settings(self) -> dict[str, Any]:
        """What decides the bytes that are written."""
        job = self.job
        options = asdict(job.options)
        samples = None
        if job.samples is not None:
            text = json.dumps([list(sample) for sample in job.samples])
            samples = hashlib.sha256(text.encode()).hexdigest()
        return {
            "QLLM": __version__,
            "model": str(job.source.resolve()),
            "state of the model": state_fingerprint(job.source),
            "layers": {name: spec.to_json() for name, spec in self.specs.items()},
            **{f"option {key}": value for key, value in options.items()},
            **{f"about {key}": value for key, value in job.about.items()},
            "calibration samples": samples,  # behind what says in words how they differ
            "dtype": str(job.dtype),
            "device": job.device,
            "fake": job.fake,
            "compressed": job.compressed,
            "shard size": job.shard_bytes,
            "origin": job.origin,
            "threads": torch.get_num_threads(),
        }

    @torch.no_grad()  # not inference mode, whose tensors tuning could not take gradients through
    def work(self, meter: Meter) -> list[LinearReport]:
        """All of it; returns what became of each linear."""
        state = self.partial.state
        self.tuned = [TuneReport(**entry) for entry in state.get("tuned", ())]
        self.reports = [
            LinearReport(**{**entry, "spec": QuantSpec(**entry["spec"])})
            for entry in state.get("reports", ())
        ]
        if not self.partial.finished:
            self.output.open(self.partial.model, state.get("shards"))
            device_type = torch.device(self.job.device).type
            ops.prepare(device_type)
            ops.keep_freed_memory(device_type, workers=self.tuning)
            self._work(state.get("done", 0), meter)
            self.output.write_small_files(self.reports, self.note)
            self.output.writer.finish()
        self.partial.finish()
        return self.reports

    def _work(self, done: int, meter: Meter) -> None:
        """The steps behind the first `done`: what is in front of the layers, each, the rest."""
        last = self.config.num_layers + 1
        if self.job.samples is not None and 0 < done <= last:
            self.hidden = self._load_states(HIDDEN, done)
        if self.tuning and 0 < done <= last:
            self.targets = self._load_states(TARGETS, done)
        if 0 < done <= last:
            where = "what is behind the layers" if done == last else f"layers.{done - 1}"
            self.note(f"going on at {where}, {done - 1} of {last - 1} layers are done")
        itemsize = self.weights.dtype().itemsize
        sizes = step_sizes(
            self.job, self.model, itemsize, tuning=self.tuning, distilling=self.distilling
        )
        with meter(sum(sizes), sum(sizes[:done])) as add:
            for step in range(done, last + 1 + self.distilling):

                def add_share(share: float, size: float = sizes[step]) -> None:
                    add(share * size)

                if step == 0:
                    self._front(add_share)
                elif step == last:
                    self._back()
                elif step > last:
                    self._refine_scales(add_share)
                else:  # its part of the bytes, as they are worked through
                    self._layer(step - 1, add_share)
                self._commit(step + 1)
        if self.distilling:
            replace_scales(self.output, self.partial.folder / SCALES)

    def _report(self, report: LinearReport) -> None:
        """Keep what became of a linear, and say it."""
        self.reports.append(report)
        self.note(str(report))

    def _report_tuning(self, report: TuneReport) -> None:
        """Keep what became of a block that was tuned, and say it."""
        self.tuned.append(report)
        self.note(str(report))

    def _states_path(self, name: str, done: int) -> Path:
        return self.partial.folder / f"{name}-{done}.safetensors"

    def _load_states(self, name: str, done: int) -> HiddenStates:
        path = self._states_path(name, done)
        return HiddenStates.load(path, self.model.positions, self.job.device)

    def _commit(self, done: int) -> None:
        """Put on the disk that `done` steps are finished, and what the next one needs."""
        kept = []
        last = self.config.num_layers + 1
        ends = (HIDDEN, self.hidden, last), (TARGETS, self.targets, last + self.distilling)
        for name, states, end in ends:
            if states is not None and done <= end:
                kept.append(self._states_path(name, done))
                states.save(kept[-1])
        state = {
            "done": done,
            "shards": self.output.writer.sync(),
            "reports": [asdict(report) for report in self.reports],
            "tuned": [asdict(report) for report in self.tuned],
            "distilling": self.distilling,
        }
        self.partial.commit(state)
        for name in (HIDDEN, TARGETS):
            for path in self.partial.folder.glob(f"*{name}-*"):
                if path not in kept:
                    path.unlink()

    def _front(self, add: Callable[[float], object]) -> None:
        embedding = None
        for module in (*FRONT, *LAYER_INPUTS):
            if module == EMBEDDING and module in self.specs:
                embedding = self._quantize_alone(module)
                self.output.write_linear(module, embedding)
            else:
                self.output.write_floats(module, self.floats.read(module))
        if self.job.samples is not None:
            for module in (*FRONT, *LAYER_INPUTS):
                self.floats.fill(module, mapped=True)
            embed = partial(HiddenStates.embed, self.model, self.job.samples, self._states_dtype())
            if self.tuning:
                self.targets = embed()
            if embedding is not None:
                assert isinstance(embedding, WeightOnlyLinear)  # as `QuantPlan.resolve` has it
                self.model.embed = QuantizedEmbedding(embedding, torch.float32)
            # What is float in front of the layers is so for both.
            same = self.targets if embedding is None else None
            self.hidden = embed() if same is None else same.copy()
            if self.tuning:
                seen = seen_samples(self.job.samples, self.config.hidden_size)
                path, seed = self.partial.folder / FISHER, self.job.options.tune.seed
                write_fisher(self.weights, seen, path, self.job.device, add, seed)
            self.floats.drop(FRONT[:-1])
            self.floats.drop(LAYER_INPUTS if self.config.layer_inputs else ())

    def _layer(self, index: int, add: Callable[[float], object]) -> None:
        name = f"layers.{index}"
        layer = self.model.layers[index]
        modules = modules_of(layer)
        linears = [inner for inner in modules if f"{name}.{inner}" in self.specs]
        found: dict[str, Linear] = {}
        if self.hidden is not None:
            self.floats.fill_layer(index)
            specs = {inner: self.specs[f"{name}.{inner}"] for inner in linears}
            found = self._quantize(name, layer, specs, self.hidden, add)
        for inner in modules:
            full = f"{name}.{inner}"
            if inner not in found and self.specs.get(full, QuantSpec()).kind != "dense":
                found[inner] = self._quantize_alone(full)
            if inner in found:
                self.output.write_linear(full, found.pop(inner))
            elif self.hidden is not None:  # AWQ and SmoothQuant may have changed it
                module = layer.get_submodule(inner)
                if isinstance(module, Norm):
                    stored = module.stored(self.config.norm_offset)
                else:
                    stored = dict(module.named_buffers())
                self.output.write_floats(full, stored)
            else:
                self.output.write_floats(full, self.floats.read(full))
            if self.hidden is None:
                add(elements(self.model.get_submodule(full)) / elements(layer))
        self.floats.drop([name])

    def _quantize(
        self,
        name: str,
        layer: PreNormLayer,
        specs: Mapping[str, QuantSpec],
        hidden: HiddenStates,
        add: Callable[[float], object],
    ) -> dict[str, Linear]:
        """Quantize the linears of a layer whose inputs are known, and tune them if that is asked.

        Args:
            specs: of the linears, by their names in the layer.
            hidden: the states in front of the layer.
        """
        options, targets = self.job.options, self.targets
        if targets is not None and any(is_tuned(spec, options) for spec in specs.values()):
            index, path = int(name.removeprefix("layers.")), self.partial.folder / FISHER
            blocks = len(layer.blocks())  # which is the same of all layers
            channels, device = self.config.hidden_size, self.job.device
            metrics = [
                read_metric(path, index * blocks + block, channels).to(device)
                for block in range(blocks)
            ]
            pair = hidden, targets
            refined = refine_layer(layer, self.config, name, specs, pair, metrics, options, add)
            for report in refined.reports:
                self._report(report)
            for tuning in refined.tuning:
                self._report_tuning(tuning)
            return refined.linears
        if targets is not None:
            targets.advance(layer)  # while it is the float model's
        last = name == f"layers.{self.config.num_layers - 1}"
        return quantize_layer(
            layer,
            self.config,
            name,
            specs,
            hidden,
            options,
            advance=slice(0 if last and not self._head_needs_inputs() else None),
            finished=self._report,
            add=add,
        )

    def _back(self) -> None:
        head = self.specs.get(LM_HEAD)
        for module in BACK:
            if module != LM_HEAD or head is None:
                self.output.write_floats(module, self.floats.read(module))
        if head is None:
            return
        stats = None
        if self._head_needs_inputs():
            for module in BACK[:-1]:
                self.floats.fill(module)
            model, linear = self.model, self.model.lm_head
            assert self.hidden is not None  # as where any linear needs inputs
            assert isinstance(linear, Linear)

            def run(x: Tensor, step: Prefill) -> Tensor:
                return linear(model.project_out(model.final_norm(x)))

            products = {LM_HEAD} if algorithm_of(head).products else set()
            stats = self.hidden.observe(run, {LM_HEAD: linear}, products, "model")[LM_HEAD]
        self.output.write_linear(LM_HEAD, self._quantize_alone(LM_HEAD, stats))

    def _refine_scales(self, add: Callable[[float], object]) -> None:
        """Finish the checkpoint, tune its scales, and open it again for those."""
        self.hidden = self.targets = None
        file = SafetensorsFile(self._states_path(TARGETS, self.config.num_layers + 2))
        self.output.write_small_files(self.reports, silent)  # it is said at the end
        self.output.writer.finish()
        tied = self.config.tied_head and EMBEDDING in self.specs
        head = self.floats.linear(LM_HEAD).weight if tied or LM_HEAD in self.specs else None
        scales, dtype = self.partial.folder / SCALES, self._states_dtype()
        targets = file.map("states")
        refine_scales(self.output, scales, self.job, targets, head, dtype, self.note, add)
        self.output.open(self.partial.model, self.output.writer.shards)

    def _head_needs_inputs(self) -> bool:
        return LM_HEAD in self.specs and needs_inputs(self.specs[LM_HEAD])

    def _quantize_alone(self, name: str, stats: InputStats | None = None) -> Linear:
        """A linear of the checkpoint, quantized."""
        module = self.floats.linear(name)
        linear, report = quantize_linear(module, name, self.specs[name], stats, self.job.options)
        self._report(report)
        return linear
