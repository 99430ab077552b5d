"""Run a model's linears at all candidate bits, one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qllm import ops
from qllm.checkpoint.fingerprint import state_fingerprint
from qllm.checkpoint.load import elements, module_bytes
from qllm.checkpoint.weights import Weights
from qllm.config import DEFAULT_ALGORITHM, EMBEDDING, LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.evaluate.scoring import logit_pieces
from qllm.layers import Linear
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.memory import check_fits
from qllm.models.embeddings import QuantizedEmbedding
from qllm.models.layer import PreNormLayer
from qllm.models.logits import finish_logits
from qllm.plan.modules import decided_modules
from qllm.plan.output_errors import SMALLEST, OutputErrors, observed_together, products_bytes
from qllm.plan.resume import PartialTable
from qllm.plan.sensitivity import Array, Sensitivity, draw_choices
from qllm.progress import Meter, Note, silent, unseen
from qllm.quant.inputs import InputStats
from qllm.quantizer.floats import BACK, FRONT, FloatModel
from qllm.quantizer.hidden import HiddenStates, check_alone
from qllm.quantizer.layer import QuantizeOptions, quantize_linear, stand_in

# Bits at which a linear is run alone: its divergence is well above rounding, and still small.
PROBE_BITS = 3
PLANS = 8  # of mixed bits


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        source: folder of a 16- or 32-bit checkpoint.
        candidates: the specs that each linear may have, by rising bits.
        samples: token ids, of one length, that Hessians are made of.
        judged: token ids, of one length, on which divergence is measured.
        lm_head: the LM head is one of the linears.
        embedding: the embedding is decided on as well, and with it a head that is tied to it.
        plans: how many plans of mixed bits are run.
    """

    source: Path
    candidates: tuple[QuantSpec, ...]
    samples: Sequence[Sequence[int]]
    judged: Sequence[Sequence[int]]
    lm_head: bool = False
    embedding: bool = False
    plans: int = PLANS
    seed: int = 0
    options: QuantizeOptions = field(default_factory=QuantizeOptions)
    device: str = "cpu"

    def about(self) -> dict[str, object]:
        """What decides the figures."""
        text = json.dumps([[list(s) for s in part] for part in (self.samples, self.judged)])
        found: dict[str, object] = {
            "model": state_fingerprint(self.source),
            "candidates": [
                spec.to_json() | {"algorithm": spec.algorithm} for spec in self.candidates
            ],
            "samples": hashlib.sha256(text.encode()).hexdigest(),
            "lm_head": self.lm_head,
            "plans": self.plans,
            "seed": self.seed,
            "options": asdict(self.options),
        }
        # Tables from before embeddings were decided on do not speak of them, and are as good.
        return found | ({"embedding": True} if self.embedding else {})


@torch.inference_mode()
def measure(
    job: Job,
    meter: Meter = unseen,
    note: Note = silent,
    partial: PartialTable | None = None,
) -> Sensitivity:
    """Measure how much each candidate of each linear changes what the model says.

    Layer by layer the Hessian of each linear's input is summed over the float model's states, each
    candidate is quantized, and each plan's own states go through the layer with its choice.

    Args:
        partial: where a run that is interrupted leaves what it has, and this one goes on from.

    Raises:
        UserError: for a checkpoint that is quantized or broken, or too little memory; what was
            interrupted is another run.
    """
    return _Run(job, note, partial).work(meter)


class _Run:
    """One call of `measure`."""

    def __init__(self, job: Job, note: Note, partial: PartialTable | None) -> None:
        self.job, self.note, self.partial = job, note, partial
        self.weights = Weights.of_floats(job.source, note)
        self.config = self.weights.config
        check_alone(self.config, "the planner", "write rules of bits by hand")
        self.floats = FloatModel(self.weights, job.device)
        self.model = self.floats.model
        self.modules = decided_modules(self.weights, job.lm_head, job.embedding)
        self.choices = draw_choices(len(self.modules), job.candidates, job.plans, job.seed)
        bits = [abs(spec.bits - PROBE_BITS) for spec in job.candidates]
        self.probe = bits.index(min(bits))
        self.table = OutputErrors(self.modules, self.config, job.candidates, job.options)
        check_fits(self._bytes_needed(), job.device, "measuring the losses")

    def _bytes_needed(self) -> int:
        """About what is in memory at the peak."""
        paths = 1 + len(self.choices) + len(self.modules)
        tokens = sum(map(len, self.job.samples)) + paths * sum(map(len, self.job.judged))
        layers = list(self.model.layers)
        layer = max(module_bytes(layer) for layer in layers)
        packed = layer * sum(min(spec.bits, 16) for spec in self.job.candidates) // 32
        # The sums of x x^T of a run; and of the widest its order, root and reversal.
        runs = [run for each in layers for run in observed_together(_linears(each))]
        sums = [[products_bytes(linear) for linear in run.values()] for run in runs]
        products = max(map(sum, sums)) + 3 * max(map(max, sums))
        return 4 * tokens * self.config.hidden_size + 2 * layer + packed + products

    def work(self, meter: Meter) -> Sensitivity:
        device_type = torch.device(self.job.device).type
        ops.prepare(device_type)
        ops.keep_freed_memory(device_type)
        for module in FRONT:
            self.floats.fill(module, mapped=True)
        done = self._go_on()
        if not done:
            self._embed()
        if not (self.config.tied_head or self.job.lm_head or self.job.embedding):
            self.floats.drop(FRONT[:-1])
        sizes = [elements(layer) for layer in self.model.layers]
        with meter(sum(sizes), sum(sizes[:done])) as add:
            for index, size in enumerate(sizes[done:], done):
                self._layer(index)
                if self.partial is not None and self.partial.due:
                    self.partial.save(self._so_far(index + 1))
                add(size)
        alone, mixed = self._head()
        return Sensitivity(
            self.modules,
            self.job.candidates,
            self.table.errors,
            self.table.float32_scales,
            self.probe,
            alone,
            self.choices,
            mixed,
            self.job.about(),
        )

    def _embed(self) -> None:
        """All paths' states in front of the layers."""
        embed = HiddenStates.embed
        self.hidden = embed(self.model, self.job.samples, torch.float32)
        self.float = embed(self.model, self.job.judged, torch.float32)
        self.mixed = [self.float.copy() for _ in self.choices]
        self.alone: list[HiddenStates] = []  # of each linear so far, in the modules' order
        if self.job.embedding:
            self.alone.append(self._embedded(self.probe))
            self.mixed = [self._embedded(choice[0]) for choice in self.choices]
            for candidate, _ in enumerate(self.job.candidates):
                self._embedding(candidate, keep=True)

    def _so_far(self, done: int) -> dict[str, Tensor]:
        """What the layers behind `done` of them need, for `_go_on`."""
        paths = {"hidden": self.hidden, "float": self.float}
        paths |= {f"mixed.{index}": path for index, path in enumerate(self.mixed)}
        paths |= {f"alone.{index}": path for index, path in enumerate(self.alone)}
        return {
            **{name: path.states for name, path in paths.items()},
            **{"done": torch.tensor(done), "errors": torch.from_numpy(self.table.errors)},
            "float32_scales": torch.from_numpy(self.table.float32_scales),
        }

    def _go_on(self) -> int:
        """Take up what an interrupted run left, if one did; how many layers it had done."""
        found = {} if self.partial is None else self.partial.load()
        if not found:
            return 0

        def path(name: str) -> HiddenStates:
            return HiddenStates(found[name].to(self.job.device), self.model.positions)

        done = int(found["done"])
        self.hidden, self.float = path("hidden"), path("float")
        self.mixed = [path(f"mixed.{index}") for index in range(len(self.choices))]
        count = sum(name.startswith("alone.") for name in found)
        self.alone = [path(f"alone.{index}") for index in range(count)]
        self.table.errors = found["errors"].numpy()
        self.table.float32_scales = found["float32_scales"].numpy().astype(np.int64)
        self.note(f"going on: {done} of {self.config.num_layers} layers are measured already")
        return done

    def _embedding(self, candidate: int, *, keep: bool = False) -> WeightOnlyLinear | None:
        """The embedding as a candidate has it, None where that leaves it as it is.

        It is made where it is needed: all of them are too much to keep.

        Args:
            keep: its error and scales.
        """
        spec = replace(self.job.candidates[candidate], algorithm=DEFAULT_ALGORITHM)
        if spec.kind != "weight_only":
            return None
        module = self.floats.linear(EMBEDDING)
        linear, report = quantize_linear(module, EMBEDDING, spec, None, self.job.options)
        assert isinstance(linear, WeightOnlyLinear)
        if keep:
            self.table.keep(0, candidate, linear, report)
        return linear

    def _embedded(self, candidate: int) -> HiddenStates:
        """The judged text's states in front of the layers, of a candidate's embedding."""
        table, embed = self._embedding(candidate), self.model.embed
        if table is not None:
            self.model.embed = QuantizedEmbedding(table, torch.float32)
        states = HiddenStates.embed(self.model, self.job.judged, torch.float32)
        self.model.embed = embed
        return states

    def _layer(self, index: int) -> None:
        name = f"layers.{index}"
        layer = self.model.layers[index]
        self.floats.fill_layer(index, mapped=True)
        modules = _linears(layer)
        found = self._candidates(name, layer, modules)
        rows: dict[int, list[str]] = {}  # the linears of what is decided on, in the modules' order
        for inner in modules:
            rows.setdefault(self.table.rows[f"{name}.{inner}"], []).append(inner)
        for block, _ in layer.blocks():
            self.hidden.advance(block)
        for path in self.alone:
            self._advance(path, layer, modules)
        for members in rows.values():
            path = self.float.copy()
            probed = {inner: stand_in(found[inner][self.probe]) for inner in members}
            self._advance(path, layer, modules | probed)
            self.alone.append(path)
        with self.table.of_int8(name, modules, found):
            self._advance(self.float, layer, modules)
        for path, choice in zip(self.mixed, self.choices, strict=True):
            picked = {inner: choice[row] for row, members in rows.items() for inner in members}
            linears = {inner: stand_in(found[inner][c]) for inner, c in picked.items()}
            self._advance(path, layer, linears)
        self.floats.drop([name])

    def _candidates(
        self, name: str, layer: PreNormLayer, modules: Mapping[str, Linear]
    ) -> dict[str, list[Linear]]:
        """A layer's linears as each candidate has them, by their names in it."""
        found = {}
        for run in observed_together(modules):
            stats = self.hidden.observe(layer, run, set(run), name)
            lost = [inner for inner, seen in stats.items() if not seen.count]
            if lost:
                self.note(
                    f"{name}: no token of the text reaches {len(lost)} of {len(modules)} linears, "
                    f"such as {lost[0]}: what they lose counts for nothing"
                )
            for inner, module in run.items():
                seen = stats.pop(inner)
                found[inner] = self.table.quantized(f"{name}.{inner}", module, seen)
        return found

    def _advance(
        self, path: HiddenStates, layer: PreNormLayer, linears: Mapping[str, Linear]
    ) -> None:
        """Put states through a layer with these linears."""
        for inner, module in linears.items():
            layer.set_submodule(inner, module)
        for run, _ in layer.blocks():
            path.advance(run)

    def _head(self) -> tuple[Array, Array]:
        """The divergences of the linears alone, and of the mixed plans, behind the LM head."""
        for module in BACK:
            self.floats.fill(module, mapped=True)
        model = self.model
        head = model.lm_head
        assert isinstance(head, Linear)  # of a whole model
        is_tied = next(head.buffers()).is_meta
        if is_tied:
            tied = model.embed.weight
            assert isinstance(tied, Tensor)
            head = DenseLinear(tied.float(), None, QuantSpec())

        def head_of(embedding: int) -> Linear:
            """The head behind a candidate's embedding."""
            table = self._embedding(embedding) if is_tied and self.job.embedding else None
            return head if table is None else stand_in(table)

        heads: list[Linear] = [head] * len(self.job.candidates)
        if self.job.lm_head:
            stats = InputStats(head.in_features, self.job.device, products=True, multiply=head.run)
            for sample in self.hidden.states:
                stats.add(self._last(sample))
            if not stats.finite:
                raise UserError("the input of the LM head is not finite on the calibration text")
            heads = [stand_in(each) for each in self.table.quantized(LM_HEAD, head, stats)]
        expected = [p.log_softmax(-1) for p in self._logits(self.float, head)]
        rest = self.alone[self.job.embedding :]
        alone = [self._divergence(path, head, expected) for path in rest]
        if self.job.embedding:
            alone.insert(0, self._divergence(self.alone[0], head_of(self.probe), expected))
        if self.job.lm_head:
            alone.append(self._divergence(self.float, heads[self.probe], expected))
        mixed = [
            self._divergence(
                path, heads[choice[-1]] if self.job.lm_head else head_of(choice[0]), expected
            )
            for path, choice in zip(self.mixed, self.choices, strict=True)
        ]
        return np.array(alone), np.array(mixed)

    def _last(self, x: Tensor) -> Tensor:
        return self.model.project_out(self.model.final_norm(x))

    def _logits(self, path: HiddenStates, head: Linear) -> Iterator[Tensor]:
        """Pieces of the logits of all judged tokens."""
        states = path.states.flatten(0, 1)

        def logits(x: Tensor) -> Tensor:
            return finish_logits(self.config, head(self._last(x)))

        return logit_pieces(logits, states, self.config.vocab_size)

    def _divergence(self, path: HiddenStates, head: Linear, expected: Sequence[Tensor]) -> float:
        """Mean Kullback-Leibler divergence from the float model, nats per token."""
        total = 0.0
        for p, logits in zip(expected, self._logits(path, head), strict=True):
            q = logits.log_softmax(-1)
            total += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
        # Rounding leaves a little less than nothing of two that are the same.
        return max(total / path.states.shape[:2].numel(), SMALLEST)


def _linears(layer: PreNormLayer) -> dict[str, Linear]:
    """Those of a layer that may be quantized, by their names in it, in the order of its blocks."""
    found = {}
    for _, names in layer.blocks():
        for name in names:
            module = layer.get_submodule(name)
            assert isinstance(module, Linear)
            found[name] = module
    return found
