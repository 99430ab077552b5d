"""What this machine takes for a linear and for the rest of a layer, measured."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from qllm import ops
from qllm.config import LM_HEAD, QuantSpec
from qllm.layers import Linear
from qllm.models import Decoder
from qllm.ops import phase
from qllm.ops.capture import capture
from qllm.plan.candidates import key
from qllm.plan.devices import MeasuredSpeed, Size
from qllm.plan.far_cache import FarCaches
from qllm.plan.program import Workload, sees_last_token
from qllm.plan.random_model import random_decoder, random_linear
from qllm.plan.timing import time_generation, undisturbed

# Bytes that a step goes through: what the caches of a core keep, what one that cores share may, and
# what none does. And the inputs and outputs of the matrices that they are made of: of the second,
# several, which tell what a call and a channel take from what a weight does.
WORKING_SETS = (1 << 20, 4 << 20, 16 << 20, 32 << 20, 64 << 20, 192 << 20)
SMALL: tuple[Size, ...] = ((256, 256), (256, 1024), (1024, 256), (1024, 1024))
# Of the first, and of those behind the second: of so many inputs, and of most others, 16-bit
# weights are read about as fast as those of an LM head; of 1536 they are read more slowly.
LEAST, LARGE = (1024, 256), (2048, 2048)
ROWS = {"decode": (1, 2, 4, 8, 16), "prefill": (1, 16, 128, 512)}
FORMAT = 17  # of what is found: what was kept in another is measured again
ROUNDS = 5  # of all measurements, in turns: a shared machine is slow for seconds at a time
SECONDS = 0.02  # that one measurement takes in a round at least
# Of the models with which is measured what is beside the products: family, channels of a head and
# heads that share keys; hidden size, layers and vocabulary. Scores take what they do by their
# number, and products with keys and values by their channels.
FAMILIES = (("llama", 64, 4), ("opt", 32, 1))
MODELS = ((256, 2, 1024), (256, 2, 32768), (256, 8, 1024), (1024, 4, 4096))
# Sequences, and the tokens of each.
WORK = ((1, 32), (1, 192), (1, 768), (4, 128), (8, 16), (8, 128))
# And models that no cache keeps, as those that are served are. Products take longer there than by
# themselves, since other memory is read between them, and so does each half of a layer, whose small
# tensors come from memory, each for itself. One of them is mostly an LM head. Their prompts say
# nothing new.
FAR_FAMILIES = (("llama", 64, 4), ("opt", 64, 1))
FAR_MODELS = ((768, 16, 1024), (2048, 2, 1024), (1024, 2, 32768))
FAR_WORK = ((1, 32), (1, 128), (4, 128))
STEPS = 16


def probe(
    specs: Sequence[QuantSpec],
    dtype: torch.dtype,
    device: str,
    progress: Callable[[list], Iterable] = iter,
) -> MeasuredSpeed:
    """Measure products of each spec, and what a model takes besides.

    Args:
        dtype: of activations.
        progress: what loops go through, to be seen.
    """
    found = Probe(specs, dtype, device)
    for _ in progress(list(range(ROUNDS))):
        found.measure()
    return found.speed()


class Kind(NamedTuple):
    """Of a model: one of FAMILIES and of MODELS, or one of FAR_FAMILIES and of FAR_MODELS."""

    family: str
    channels: int
    sharing: int
    hidden: int
    layers: int
    vocabulary: int

    def is_far(self) -> bool:
        return self[3:] in FAR_MODELS

    def work(self) -> tuple[tuple[int, int], ...]:
        return FAR_WORK if self.is_far() else WORK


class Probe:
    """What is measured, in rounds: each measures everything once; see `undisturbed`.

    Args:
        specs: whose products are measured; those of 16 bits always are.
        dtype: of activations.
        threads: of the CPU; None: as many as torch has.
        matrices: where several probes share them.
    """

    def __init__(
        self,
        specs: Sequence[QuantSpec],
        dtype: torch.dtype,
        device: str,
        threads: int | None = None,
        matrices: Matrices | None = None,
    ) -> None:
        self._specs = list({key(spec): spec for spec in (QuantSpec(), *specs)}.values())
        self._dtype, self._device = dtype, device
        self._threads = threads or torch.get_num_threads()
        # What surrounds products is not alike in families: the mean of some. Nor is it around
        # packed and dense ones, of which plans have the former.
        spec = self._spec = self._specs[len(self._specs) // 2]
        self._models = {
            kind: random_decoder(*kind[:5], spec, dtype, device, kind.vocabulary)
            for kind in _kinds()
        }
        self._times: defaultdict[Hashable, list[float]] = defaultdict(list)
        matrices = matrices or Matrices(dtype, device)
        self._caches = matrices.caches
        with self._own_threads():
            self._products = {
                name: self._product(matrices, *name)
                for spec in self._specs
                for name in _products(spec)
            }
            self._attention = dict(self._caches.calls())
        ops.keep_freed_memory(torch.device(device).type)  # as behind loading

    def _product(
        self, matrices: Matrices, spec: QuantSpec, name: str, nbytes: int, size: Size, rows: int
    ) -> tuple[Callable[[], object], int]:
        return _product(matrices(spec, size, nbytes), rows, self._dtype, self._device, name)

    @contextmanager
    def _own_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def measure(self) -> None:
        """Another round."""
        with self._own_threads():
            for name, (run, count) in self._products.items():
                self._times[name].append(median_seconds(run, self._device) / count)
            for far, (run, count) in self._attention.items():
                self._times["attention", far].append(median_seconds(run, self._device) / count)
            for kind, model in self._models.items():
                for batch, context in kind.work():
                    work = Workload(context, STEPS, batch)
                    prompt, step = time_generation(model, work, repeats=1)
                    self._times["step", kind, batch, context].append(step)
                    self._times["prompt", kind, batch, context].append(prompt)

    def _seconds(self, *name: Hashable) -> float:
        return undisturbed(self._times[name])

    def speed(self) -> MeasuredSpeed:
        """What the rounds until now say."""
        linears: dict[str, dict] = {name: {} for name in ROWS}
        for spec in self._specs:
            for name, counts in ROWS.items():
                table = {str(rows): self._linear(spec, name, rows) for rows in counts}
                linears[name][key(spec)] = table
        sets = tuple(map(float, WORKING_SETS))
        of_cache = self._caches.seconds(
            {name: self._seconds("attention", name) for name in self._attention}
        )
        rest = self._rest(MeasuredSpeed(linears, {}, (0.0, *of_cache), {}, sets, 0.0))
        halves, passes = {}, {}
        for name, (of_pass, of_row, of_logit, *of_half, _, _) in rest.items():
            passes[name] = of_pass, of_row, of_logit
            fixed, far, of_value, of_score, of_product = of_half
            halves[name] = fixed, far, of_value, of_score, of_product
        *_, read, among_others = rest["decode"]
        return MeasuredSpeed(linears, halves, (read, *of_cache), passes, sets, among_others)

    def _linear(self, spec: QuantSpec, name: str, rows: int) -> tuple[float, ...]:
        """Coefficients of `MeasuredSpeed.linears`."""
        least, small, *larger = WORKING_SETS
        features = [[1.0, sum(size), math.prod(size)] for size in SMALL]
        times = [self._seconds(spec, name, small, size, rows) for size in SMALL]
        call, channel, weight = _fit(list(zip(features, times, [0.0] * len(times), strict=True)))

        def of_weight(nbytes: int, size: Size) -> float:
            seconds = self._seconds(spec, name, nbytes, size, rows)
            return (seconds - call - channel * sum(size)) / math.prod(size)

        decode = name == "decode"
        weights = [max(0.0, min(weight, of_weight(least, LEAST))) if decode else weight, weight]
        for nbytes in larger:
            each = of_weight(nbytes if decode else larger[-1], LARGE)
            weights.append(max(each, weights[-1]))
        return call, channel, *weights

    def _rest(self, products: MeasuredSpeed) -> dict[str, tuple[float, ...]]:
        """What passes through small models take besides their products, by `_fit`.

        Returns:
            by phase, the seconds of `MeasuredSpeed.passes`, those of its `halves`, the first of
            its `cache`, of whose others `products` knows, and its `among_others`; the last two are
            0 of prompts.
        """
        _, far_byte, far_head = products.cache
        decode: list[tuple[list[float], float, float]] = []
        prefill: list[tuple[list[float], float, float]] = []
        for kind, model in self._models.items():
            _, channels, sharing, hidden, layers, vocabulary = kind
            count, heads = 2 * layers, hidden // channels
            held = float(sum(module.nbytes() for module in _linears(model).values()))
            given = model, self._spec, products
            for batch, context in kind.work():
                scores = layers * batch * heads * (context + STEPS / 2)
                read = 2 * scores * channels / sharing * self._dtype.itemsize
                far = products.farness(held + read)
                logits = batch * vocabulary
                features = [1.0, batch, logits, count, count * far, count * batch * hidden]
                features += [scores, scores * channels, read]
                known = _products_of(*given, batch, batch, held + read, decoding=True)
                features.append(far * known)
                known += far * (far_byte * read + far_head * layers * batch * heads / sharing)
                decode.append((features, self._seconds("step", kind, batch, context), known))
                if kind.is_far():
                    continue
                rows, scores = batch * context, layers * batch * heads * context**2
                features = [1.0, batch, logits, count, 0.0, count * rows * hidden]
                features += [scores, scores * channels, 0.0, 0.0]
                known = _products_of(*given, rows, batch, held, decoding=False)
                prefill.append((features, self._seconds("prompt", kind, batch, context), known))
        return {"decode": _fit(decode), "prefill": _fit(prefill)}


def _kinds() -> Iterator[Kind]:
    for families, models in ((FAMILIES, MODELS), (FAR_FAMILIES, FAR_MODELS)):
        for family in families:
            for sizes in models:
                yield Kind(*family, *sizes)


def _linears(model: Decoder) -> dict[str, Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear)}


def _products_of(
    model: Decoder,
    spec: QuantSpec,
    products: MeasuredSpeed,
    rows: int,
    last_rows: int,
    held: float,
    *,
    decoding: bool,
) -> float:
    """Seconds of a model's linears, of which some see only each prompt's last token.

    Args:
        spec: of those in layers.
        held: bytes that a step reads.
    """
    seconds = 0.0
    for name, module in _linears(model).items():
        size = module.in_features, module.out_features
        n = last_rows if sees_last_token(name, model.config.num_layers) else rows
        own, as_step = (QuantSpec(), True) if name == LM_HEAD else (spec, decoding)
        seconds += products.linear(own, size, 0, n, decode=as_step, model=held)
    return seconds


def _products(spec: QuantSpec) -> Iterator[tuple[QuantSpec, str, int, Size, int]]:
    """The spec, phase, bytes, matrices' size and rows of all that is measured of a spec."""
    for name, counts in ROWS.items():
        # Prompts are bound by arithmetic: wherever their weights come from, all take as long.
        least, small, *larger = WORKING_SETS
        sets = [(small, size) for size in SMALL]
        if name == "decode":
            sets += [(least, LEAST), *((each, LARGE) for each in larger)]
        else:
            sets.append((larger[-1], LARGE))
        for nbytes, size in sets:
            for rows in counts:
                yield spec, name, nbytes, size, rows


class Matrices:
    """Matrices of random weights; those of a small working set are among a larger one's.

    Attributes:
        caches: of keys and values.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self._dtype, self._device = dtype, device
        self._fresh: dict[tuple[QuantSpec, Size], Linear] = {}
        self._laid_out: defaultdict[tuple[QuantSpec, Size], list[Linear]] = defaultdict(list)
        self.caches = FarCaches(WORKING_SETS[1], WORKING_SETS[-1], dtype, device)

    def __call__(self, spec: QuantSpec, size: Size, nbytes: int) -> Sequence[Linear]:
        """As many as have the bytes together."""
        name = spec, size
        if name not in self._fresh:
            self._fresh[name] = random_linear(spec, size, self._dtype, self._device)
        linears = self._laid_out[name]
        while not linears or len(linears) * linears[0].nbytes() < nbytes:
            # Each is laid out by itself, as those of a model are: a copy of one that is would bring
            # along the memory of all that lie beside it.
            linears.append(copy.deepcopy(self._fresh[name]))
            linears[-1].process_weights_after_loading()
        return linears[: -(-nbytes // linears[0].nbytes())]


def _product(
    linears: Sequence[Linear], rows: int, dtype: torch.dtype, device: str, name: str
) -> tuple[Callable[[], object], int]:
    """A call that multiplies with some matrices in turn, and their number."""
    if name == "prefill":  # bound by arithmetic: two matrices are as good as all
        linears = linears[:2]
    x = torch.randn(rows, linears[0].in_features, dtype=dtype, device=device)

    def run() -> None:
        for linear in linears:
            linear(x)

    if name == "prefill":
        return run, len(linears)
    with torch.inference_mode(), phase.decode():
        step = capture(run, torch.device(device), alone=True)  # as steps of decode are
    return step.replay, len(linears)


@torch.inference_mode()
def median_seconds(run: Callable[[], object], device: str) -> float:
    """Of the runs that fit into SECONDS, after one that is not counted.

    The fastest run of many is faster than those of a text are on the whole.
    """
    on_gpu = torch.device(device).type == "cuda"
    run()
    times: list[float] = []
    while sum(times) < SECONDS:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _fit(
    rows: Sequence[tuple[list[float], float, float]],
) -> tuple[float, ...]:
    """Coefficients, 0 or more, with which features and what is known add up to the seconds.

    What is missed counts by its share of a pass, which is what predictions are judged by, and not
    squared: passes that take longer than others by what is no feature (caches that keep less of
    some cache of keys and values) do not make all others seem to take longer, too.

    Args:
        rows: features, the seconds of a pass, and those that are known, as of its products.
    """
    from scipy.optimize import linprog

    features = np.array([row for row, _, _ in rows])
    seconds, known = np.array([[whole, part] for _, whole, part in rows]).T
    weighed = features / seconds[:, None]
    scale = weighed.max(axis=0)
    scale[scale == 0] = 1  # what none of them has
    matrix, target = weighed / scale, 1 - known / seconds
    missed = np.eye(len(rows))  # each of them at least as large as what is missed, either way
    found = linprog(
        np.r_[np.zeros(len(scale)), np.ones(len(rows))],
        A_ub=np.block([[matrix, -missed], [-matrix, -missed]]),
        b_ub=np.r_[target, -target],
    )
    return tuple(map(float, found.x[: len(scale)] / scale))
