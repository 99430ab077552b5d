"""Run a model's linears at all candidate bits, one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qllm import ops
from qllm.checkpoint.fingerprint import state_fingerprint
from qllm.checkpoint.load import elements
from qllm.checkpoint.weights import Weights
from qllm.config import DEFAULT_ALGORITHM, EMBEDDING, LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.evaluate.scoring import logit_pieces
from qllm.layers import Linear
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.memory import check_fits
from qllm.models.layer import PreNormLayer, QuantizedEmbedding
from qllm.models.logits import finish_logits
from qllm.plan.resume import PartialTable
from qllm.plan.sensitivity import Array, Sensitivity, draw_choices
from qllm.progress import Meter, Note, silent, unseen
from qllm.quant.inputs import InputStats
from qllm.quantizer.floats import BACK, FRONT, FloatModel
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.layer import LinearReport, QuantizeOptions, quantize_linear, stand_in

# Bits at which a linear is run alone: its divergence is well above rounding, and still small.
PROBE_BITS = 3
PLANS = 8  # of mixed bits
SMALLEST = 1e-12  # divergence that is told from none


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


def decided_modules(weights: Weights, lm_head: bool, embedding: bool = False) -> tuple[str, ...]:
    """The names of the linears that a plan decides on, in the order in which states meet them.

    Args:
        lm_head: the LM head is one of them.
        embedding: the embedding is one.

    Raises:
        UserError: for a head that would be decided on twice, or a mixture of experts.
    """
    if lm_head and embedding and weights.config.tied_head:
        raise UserError(
            "this model's LM head is its embedding, and `embedding` decides on both; leave "
            "`lm_head` out"
        )
    if weights.config.experts is not None:
        raise UserError(
            f"{weights.checkpoint.folder} is a mixture of experts, of which each token reads a "
            "part: no plan is made for it yet; write one by hand, or give one `bitwidth`"
        )
    names = weights.family.layer_linears(weights.config)
    return (*[EMBEDDING] * embedding, *names, *[LM_HEAD] * lm_head)


class _Run:
    """One call of `measure`."""

    def __init__(self, job: Job, note: Note, partial: PartialTable | None) -> None:
        self.job, self.note, self.partial = job, note, partial
        self.weights = Weights.of_floats(job.source, note)
        self.config = self.weights.config
        self.floats = FloatModel(self.weights, job.device)
        self.model = self.floats.model
        self.modules = decided_modules(self.weights, job.lm_head, job.embedding)
        self.choices = draw_choices(len(self.modules), job.candidates, job.plans, job.seed)
        bits = [abs(spec.bits - PROBE_BITS) for spec in job.candidates]
        self.probe = bits.index(min(bits))
        self.errors = np.zeros((len(self.modules), len(job.candidates)))
        self.float32_scales = np.zeros_like(self.errors, dtype=bool)
        check_fits(self._bytes_needed(), job.device, "measuring the losses")

    def _bytes_needed(self) -> int:
        """About what is in memory at the peak."""
        paths = 1 + len(self.choices) + len(self.modules)
        tokens = sum(map(len, self.job.samples)) + paths * sum(map(len, self.job.judged))
        layer = sum(tensor.nbytes for tensor in self.model.layers[0].buffers())
        widest = max(self.config.hidden_size, self.config.intermediate_size)
        packed = layer * sum(min(spec.bits, 16) for spec in self.job.candidates) // 32
        return 4 * tokens * self.config.hidden_size + 2 * layer + packed + 4 * 4 * widest**2

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
            self.errors,
            self.float32_scales,
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
                self._table(candidate)  # whose error it keeps

    def _so_far(self, done: int) -> dict[str, Tensor]:
        """What the layers behind `done` of them need, for `_go_on`."""
        paths = {"hidden": self.hidden, "float": self.float}
        paths |= {f"mixed.{index}": path for index, path in enumerate(self.mixed)}
        paths |= {f"alone.{index}": path for index, path in enumerate(self.alone)}
        return {
            **{name: path.states for name, path in paths.items()},
            **{"done": torch.tensor(done), "errors": torch.from_numpy(self.errors)},
            "float32_scales": torch.from_numpy(self.float32_scales),
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
        self.errors = found["errors"].numpy()
        self.float32_scales = found["float32_scales"].numpy()
        self.note(f"going on: {done} of {self.config.num_layers} layers are measured already")
        return done

    def _table(self, candidate: int) -> WeightOnlyLinear | None:
        """The embedding as a candidate has it, None where that leaves it as it is.

        It is made where it is needed: all of them are too much to keep.
        """
        spec = replace(self.job.candidates[candidate], algorithm=DEFAULT_ALGORITHM)
        if spec.kind != "weight_only":
            return None
        module = self.floats.linear(EMBEDDING)
        linear, report = quantize_linear(module, EMBEDDING, spec, None, self.job.options)
        assert isinstance(linear, WeightOnlyLinear)
        self._keep(0, candidate, linear, report)
        return linear

    def _keep(self, row: int, candidate: int, linear: Linear, report: LinearReport) -> None:
        """What the table says of a linear as a candidate has it."""
        self.errors[row, candidate] = report.error**2
        scales = linear.get_buffer("scales")
        self.float32_scales[row, candidate] = scales.dtype == torch.float32

    def _embedded(self, candidate: int) -> HiddenStates:
        """The judged text's states in front of the layers, of a candidate's embedding."""
        table, embed = self._table(candidate), self.model.embed
        if table is not None:
            self.model.embed = QuantizedEmbedding(table, torch.float32)
        states = HiddenStates.embed(self.model, self.job.judged, torch.float32)
        self.model.embed = embed
        return states

    def _layer(self, index: int) -> None:
        name = f"layers.{index}"
        layer = self.model.layers[index]
        self.floats.fill_layer(index, mapped=True)
        halves = layer.blocks()
        modules = {inner: _linear(layer, inner) for _, names in halves for inner in names}
        stats = self.hidden.observe(layer, dict(modules), set(modules), name)
        found = {
            inner: self._candidates(f"{name}.{inner}", module, stats.pop(inner))
            for inner, module in modules.items()
        }
        for run, _ in halves:
            self.hidden.advance(run)
        for path in self.alone:
            self._advance(path, layer, modules)
        for inner in modules:
            path = self.float.copy()
            self._advance(path, layer, modules | {inner: stand_in(found[inner][self.probe])})
            self.alone.append(path)
        with self._int8_errors(name, modules, found):
            self._advance(self.float, layer, modules)
        rows = {inner: self.modules.index(f"{name}.{inner}") for inner in modules}
        for path, choice in zip(self.mixed, self.choices, strict=True):
            picked = {inner: found[inner][choice[row]] for inner, row in rows.items()}
            self._advance(path, layer, {inner: stand_in(m) for inner, m in picked.items()})
        self.floats.drop([name])

    def _advance(
        self, path: HiddenStates, layer: PreNormLayer, linears: Mapping[str, Linear]
    ) -> None:
        """Put states through a layer with these linears."""
        for inner, module in linears.items():
            layer.set_submodule(inner, module)
        for run, _ in layer.blocks():
            path.advance(run)

    def _candidates(self, name: str, module: Linear, stats: InputStats) -> list[Linear]:
        """A linear as each candidate has it; its errors are kept."""
        found = []
        for candidate, spec in enumerate(self.job.candidates):
            if spec.kind == "dense":
                found.append(module)
                continue
            assert isinstance(module, DenseLinear)  # as long as the layer is the float model's
            linear, report = quantize_linear(module, name, spec, stats, self.job.options)
            self._keep(self.modules.index(name), candidate, linear, report)
            found.append(linear)
        return found

    @contextmanager
    def _int8_errors(
        self, layer: str, modules: Mapping[str, Linear], found: Mapping[str, Sequence[Linear]]
    ) -> Iterator[None]:
        """While states pass, measure what linears with int8 activations put out.

        Their inputs are rounded as well, of which the Hessian says nothing.
        """
        int8 = [i for i, spec in enumerate(self.job.candidates) if spec.kind.startswith("w8a8")]

        def watch(name: str) -> Callable:
            squares = np.zeros((len(int8), 2))
            linears = [stand_in(found[name][candidate]) for candidate in int8]
            row = self.modules.index(f"{layer}.{name}")

            def see(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                for count, candidate in enumerate(int8):
                    error = linears[count](inputs[0]) - output
                    squares[count] += error.square().sum().item(), output.square().sum().item()
                    self.errors[row, candidate] = squares[count, 0] / max(
                        squares[count, 1], SMALLEST
                    )

            return see

        hooks = [m.register_forward_hook(watch(n)) for n, m in modules.items() if int8]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
            table = self._table(embedding) if is_tied and self.job.embedding else None
            return head if table is None else stand_in(table)

        heads: list[Linear] = [head] * len(self.job.candidates)
        if self.job.lm_head:
            stats = InputStats(head.in_features, self.job.device, products=True, multiply=head.run)
            for sample in self.hidden.states:
                stats.add(self._last(sample))
            if not stats.finite:
                raise UserError("the input of the LM head is not finite on the calibration text")
            heads = [stand_in(each) for each in self._candidates(LM_HEAD, head, stats)]
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


def _linear(layer: nn.Module, name: str) -> Linear:
    module = layer.get_submodule(name)
    assert isinstance(module, Linear)
    return module
