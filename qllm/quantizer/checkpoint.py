"""Quantize a checkpoint: one layer in memory at a time, and on from where a killed run was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qllm import __version__, ops
from qllm.checkpoint import origin
from qllm.checkpoint.convert import SOURCE_KEY, copy_small_files
from qllm.checkpoint.fingerprint import state_fingerprint
from qllm.checkpoint.formats import Int8Weight, describe, parse, take_rows
from qllm.checkpoint.load import elements
from qllm.checkpoint.reader import QUANTIZATION_KEY, Checkpoint
from qllm.checkpoint.resume import PartialFolder
from qllm.checkpoint.weights import LAYOUT_KEY, Weights
from qllm.checkpoint.writer import ShardWriter
from qllm.config import DEFAULT_ALGORITHM, LM_HEAD, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear
from qllm.layers.fp16 import DenseLinear
from qllm.layers.w8a8 import DynamicInt8Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.memory import check_fits
from qllm.models import Decoder
from qllm.models.layer import Norm
from qllm.progress import Meter, unseen
from qllm.quant.algorithm import QuantizeOptions
from qllm.quant.inputs import InputStats
from qllm.quantizer.card import model_card
from qllm.quantizer.compatibility import find_ragged, summary
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.layer import (
    LinearReport,
    algorithm_of,
    needs_inputs,
    quantize_layer,
    quantize_linear,
)

DEFAULT_SHARD_BYTES = 5 * 10**9
# The modules in front of the layers, and behind them.
FRONT = ("embed", "embed_norm", "project_in", "positions")
BACK = ("final_norm", "project_out", LM_HEAD)


@dataclass
class Job:
    """What to quantize, and how.

    Attributes:
        source: folder of a 16- or 32-bit checkpoint.
        origin: what the result records as that it was made from, see `ModelFolder.origin`; None:
            nothing.
        plan: which linear gets which spec.
        samples: token ids for calibration, of one length; None where the plan needs none.
        dtype: that activations are kept in between layers; None is the checkpoint's.
        fake: write the dequantized values in Hugging Face's layout.
        compressed: write compressed-tensors where GPTQ would do, too.
        about: what the model card says besides, such as the model's name and the data set.
    """

    source: Path
    plan: QuantPlan
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    samples: Sequence[Sequence[int]] | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    fake: bool = False
    compressed: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    origin: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)


def quantize_checkpoint(
    job: Job,
    target: Path,
    meter: Meter = unseen,
    note: Callable[[str], object] = lambda line: None,
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

    def __init__(self, job: Job, target: Path, note: Callable[[str], object]) -> None:
        self.job, self.note = job, note
        checkpoint = Checkpoint(job.source, packed=False)
        if QUANTIZATION_KEY in checkpoint.raw_config.values:
            raise UserError(
                f"{job.source} is quantized already; give the 16-bit checkpoint it was made from"
            )
        self.weights = Weights(checkpoint, note)
        self.config = self.weights.config
        linears = self.weights.family.layer_linears(self.config.num_layers)
        job.plan.check(self.config)
        self.specs = job.plan.resolve(linears, self.config.num_layers)
        if all(spec.kind == "dense" for spec in self.specs.values()):
            raise UserError("every layer stays at 16 bits; name fewer with --bitwidth or --config")
        needing = [name for name, spec in self.specs.items() if needs_inputs(spec)]
        if needing and job.samples is None:
            spec = self.specs[needing[0]]
            what = spec.algorithm if spec.kind == "weight_only" else spec.bitwidth
            raise UserError(f"{what} needs calibration text; name one with --dataset")
        self.model = Decoder(self.config, {}, torch.float32)
        self.by_part = {
            part: spec for name, spec in self.specs.items() for part in self._rows_of_parts(name)
        }
        outer = [n for n, m in self.model.named_children() if isinstance(m, Linear)]
        for name in outer:  # OPT-350m's projections, which other tools look up as well
            if name != LM_HEAD:
                self.by_part |= dict.fromkeys(self.weights.names.rows_of_parts(name), QuantSpec())
        gptq = job.options.gptq
        reordered = gptq.act_order and not gptq.static_groups
        self.quantization = describe(self.by_part, desc_act=reordered, compressed=job.compressed)
        self.storage = parse(self.quantization, "config.json")
        if job.samples is not None:
            check_fits(self._bytes_needed(), job.device, "calibration")
        self.partial = PartialFolder(target, self._settings())
        self.reports: list[LinearReport] = []
        self.hidden: HiddenStates | None = None

    def _rows_of_parts(self, module: str) -> dict[str, slice | Tensor]:
        """As `TensorNames.rows_of_parts`; a quantized head has the name that readers look for."""
        if module == LM_HEAD and LM_HEAD in self.specs:
            return {module: slice(None)}
        return self.weights.names.rows_of_parts(module)

    def _bytes_needed(self) -> int:
        """About what calibration has in memory at its peak."""
        samples, length = len(self.job.samples), len(self.job.samples[0])
        dtype = self.job.dtype or self.weights.default_dtype()
        hidden = samples * length * self.config.hidden_size * dtype.itemsize
        layer = sum(tensor.nbytes for tensor in self.model.layers[0].buffers())
        # The sum of x x^T of the widest input, its order, root and reversal.
        widest = max(self.config.hidden_size, self.config.intermediate_size)
        return hidden + 2 * layer + 4 * 4 * widest**2

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
            "calibration samples": samples,
            "dtype": str(job.dtype),
            "device": job.device,
            "fake": job.fake,
            "compressed": job.compressed,
            "shard size": job.shard_bytes,
            "origin": job.origin,
            "threads": torch.get_num_threads(),
            **{f"about {key}": value for key, value in job.about.items()},
        }

    @torch.inference_mode()
    def work(self, meter: Meter) -> list[LinearReport]:
        """All of it; returns what became of each linear."""
        state = self.partial.state
        self.reports = [
            LinearReport(**{**entry, "spec": QuantSpec(**entry["spec"])})
            for entry in state.get("reports", ())
        ]
        if not self.partial.finished:
            names = (len(name) for name in self.weights.checkpoint.tensors)
            self.writer = ShardWriter(
                self.partial.model,
                limit=self.job.shard_bytes,
                header_bytes=sum(4 * (length + 160) for length in names) + 65536,
                state=state.get("shards"),
            )
            ops.prepare(torch.device(self.job.device).type)
            self._work(state.get("done", 0), meter)
            self._write_small_files()
            self.writer.finish()
        self.partial.finish()
        return self.reports

    def _work(self, done: int, meter: Meter) -> None:
        """The steps behind the first `done`: what is in front of the layers, each, the rest."""
        last = self.config.num_layers + 1
        if self.job.samples is not None and 0 < done <= last:
            path = self._hidden_path(done)
            self.hidden = HiddenStates.load(path, self.model.positions, self.job.device)
        if 0 < done <= last:
            where = "what is behind the layers" if done == last else f"layers.{done - 1}"
            self.note(f"going on at {where}, {done - 1} of {last - 1} layers are done")
        sizes = self._sizes()
        with meter(sum(sizes), sum(sizes[:done])) as add:
            for step in range(done, last + 1):
                if step == 0:
                    self._front()
                elif step == last:
                    self._back()
                else:  # its part of the bytes, as they are worked through
                    self._layer(step - 1, lambda share, size=sizes[step]: add(share * size))
                self._commit(step + 1)

    def _sizes(self) -> list[int]:
        """Bytes of the checkpoint that each step quantizes: what is only copied takes no time."""
        itemsize = self.weights.dtype().itemsize
        layers = [elements(layer) * itemsize for layer in self.model.layers]
        return [0, *layers, 0]

    def _report(self, report: LinearReport) -> None:
        """Keep what became of a linear, and say it."""
        self.reports.append(report)
        of = "outputs" if report.of_output else "weights"
        self.note(f"{report.name}: relative error {report.error:.2%} of the {of}")

    def _hidden_path(self, done: int) -> Path:
        return self.partial.folder / f"hidden-{done}.safetensors"

    def _commit(self, done: int) -> None:
        """Put on the disk that `done` steps are finished, and what the next one needs."""
        if self.hidden is not None and done <= self.config.num_layers + 1:
            self.hidden.save(self._hidden_path(done))
        state = {
            "done": done,
            "shards": self.writer.sync(),
            "reports": [asdict(report) for report in self.reports],
        }
        self.partial.commit(state)
        for path in self.partial.folder.glob("*hidden-*"):
            if path != self._hidden_path(done):
                path.unlink()

    def _front(self) -> None:
        for module in FRONT:
            self._write_floats(module, self._floats(module))
        if self.job.samples is not None:
            for module in FRONT:
                self._fill(module, mapped=True)
            dtype = self.job.dtype or self.weights.default_dtype()
            self.hidden = HiddenStates.embed(self.model, self.job.samples, dtype)
            self._drop(FRONT[:-1])

    def _layer(self, index: int, add: Callable[[float], object]) -> None:
        name = f"layers.{index}"
        layer = self.model.layers[index]
        modules = [
            inner
            for inner, module in layer.named_modules()
            if any(True for _ in module.buffers(recurse=False))
        ]
        linears = [inner for inner in modules if isinstance(layer.get_submodule(inner), Linear)]
        found: dict[str, Linear] = {}
        if self.hidden is not None:
            for inner in modules:
                self._fill(f"{name}.{inner}")
            specs = {inner: self.specs[f"{name}.{inner}"] for inner in linears}
            more = index + 1 < self.config.num_layers or self._head_needs_inputs()
            found = quantize_layer(
                layer,
                self.config,
                name,
                specs,
                self.hidden,
                self.job.options,
                advance=more,
                finished=self._report,
                add=add,
            )
        for inner in modules:
            full = f"{name}.{inner}"
            if inner not in found and self.specs.get(full, QuantSpec()).kind != "dense":
                found[inner] = self._quantize_alone(full)
            if inner in found:
                self._write_linear(full, found.pop(inner))
            elif self.hidden is not None:  # AWQ and SmoothQuant may have changed it
                module = layer.get_submodule(inner)
                norm = isinstance(module, Norm)
                stored = module.stored(self.config.norm_offset) if norm else module.named_buffers()
                self._write_floats(full, dict(stored))
            else:
                self._write_floats(full, self._floats(full))
            if self.hidden is None:
                add(elements(self.model.get_submodule(full)) / elements(layer))
        self._drop([name])

    def _back(self) -> None:
        head = self.specs.get(LM_HEAD)
        for module in BACK:
            if module != LM_HEAD or head is None:
                self._write_floats(module, self._floats(module))
        if head is None:
            return
        stats = None
        if self._head_needs_inputs():
            for module in BACK[:-1]:
                self._fill(module)
            model = self.model

            def run(x: Tensor, step: object) -> Tensor:
                return model.lm_head(model.project_out(model.final_norm(x)))

            products = {LM_HEAD} if algorithm_of(head).products else set()
            stats = self.hidden.observe(run, {LM_HEAD: model.lm_head}, products, "model")[LM_HEAD]
        self._write_linear(LM_HEAD, self._quantize_alone(LM_HEAD, stats))

    def _head_needs_inputs(self) -> bool:
        return LM_HEAD in self.specs and needs_inputs(self.specs[LM_HEAD])

    def _quantize_alone(self, name: str, stats: InputStats | None = None) -> Linear:
        """A linear of the checkpoint, quantized."""
        floats = self._floats(name) or self._floats("embed")  # a tied head has no weight of its own
        weight = floats["weight"].to(self.job.device)
        module = DenseLinear(weight, floats.get("bias"), QuantSpec())
        linear, report = quantize_linear(module, name, self.specs[name], stats, self.job.options)
        self._report(report)
        return linear

    def _floats(self, module: str, *, mapped: bool = False) -> dict[str, Tensor]:
        """A module's tensors as the checkpoint has them, "weight" and "bias"."""
        keys = [key for key in ("weight", "bias") if f"{module}.{key}" in self.weights.shapes]
        return {key: self.weights.read(f"{module}.{key}", mapped=mapped) for key in keys}

    def _fill(self, name: str, *, mapped: bool = False) -> None:
        """Give a module of the model its tensors: a linear and a norm in float32."""
        module = self.model.get_submodule(name)
        for key, tensor in self._floats(name, mapped=mapped).items():
            value = tensor if name == "embed" else tensor.float()
            setattr(module, key, value.to(self.job.device))

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self.model.set_submodule(name, nn.Identity())

    def _write_floats(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Append a module's tensors, in the type that the checkpoint has them in."""
        for part, rows in self._rows_of_parts(module).items() if tensors else ():
            for key, tensor in tensors.items():
                name = f"{module}.{key}"
                values = tensor[rows].to(self.weights.dtype(name))
                self.writer.write(f"{part}.{key}", self._turned(name, values))

    def _turned(self, name: str, tensor: Tensor) -> Tensor:
        """One of our tensors as Hugging Face's layout has it."""
        return tensor.t().contiguous() if self.weights.family.is_transposed(name) else tensor

    def _write_linear(self, module: str, linear: Linear) -> None:
        """Append a quantized linear's parts in the format of the checkpoint."""
        whole = linear.dequantize() if self.job.fake else None
        for part, rows in self._rows_of_parts(module).items():
            if whole is not None:
                dtype = self.weights.dtype(
                    "embed.weight" if module == LM_HEAD else f"{module}.weight"
                )
                tensors = {"weight": self._turned(f"{module}.weight", whole[rows].to(dtype))}
            else:
                tensors = self._pack(linear, part, rows)
            if linear.bias is not None:
                tensors["bias"] = linear.bias[rows].to(self.weights.dtype(f"{module}.bias"))
            for key, tensor in tensors.items():
                self.writer.write(f"{part}.{key}", tensor)

    def _pack(self, linear: Linear, part: str, rows: slice | Tensor) -> dict[str, Tensor]:
        """Some rows of a quantized linear as the tensors of a module of the checkpoint."""
        if isinstance(linear, DynamicInt8Linear):
            whole = Int8Weight(*linear.integers, linear.input_scale)
        else:
            assert isinstance(linear, WeightOnlyLinear)
            whole = linear.packed
        return self.storage.find(part).write(take_rows(whole, rows), linear.in_features)

    def _algorithm(self, report: LinearReport) -> str:
        """What chose a linear's integers, in a word or two."""
        spec, job = report.spec, self.job
        if spec.kind != "weight_only" and job.samples is None:
            return DEFAULT_ALGORITHM
        algorithm = algorithm_of(spec)
        clipped = spec.kind == "weight_only" and job.options.clip and not algorithm.own_clipping
        return f"{algorithm.name}, clipped" if clipped else algorithm.name

    def _write_small_files(self) -> None:
        """What stands beside the weights: config.json, the tokenizer, the model card."""
        job, folder = self.job, self.partial.model
        raw = dict(self.weights.checkpoint.raw_config.values)
        gone = (LAYOUT_KEY, SOURCE_KEY, *origin.KEYS)
        config = {key: value for key, value in raw.items() if key not in gone}
        config["tie_word_embeddings"] = self.config.tied_head and LM_HEAD not in self.specs
        # A converted copy knows what it was made from.
        base = raw.get(origin.BASE_MODEL_KEY) if LAYOUT_KEY in raw else job.origin
        config |= origin.record(base, map(self._algorithm, self.reports))
        if job.fake:
            entries = {
                part: spec.to_json() | {"algorithm": spec.algorithm}
                for part, spec in self.by_part.items()
            }
            _write_json(folder / "weight_config.json", entries)
        else:
            config[QUANTIZATION_KEY] = self.quantization
        _write_json(folder / "config.json", config)
        copy_small_files(job.source, folder)
        quantization = self.quantization
        ragged = find_ragged(self.specs, self.weights.shapes)
        if not job.fake:
            self.note(summary(quantization, ragged))
        card = model_card(
            job.about,
            self.reports,
            job.options,
            fake=job.fake,
            quantization=quantization,
            ragged=ragged,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
