"""What this machine takes for a linear and for the rest of a layer, measured."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from qllm import ops
from qllm.config import QuantSpec
from qllm.layers import Linear
from qllm.ops import phase
from qllm.ops.capture import capture
from qllm.plan.candidates import key
from qllm.plan.devices import MeasuredSpeed, Size
from qllm.plan.far_cache import FarCaches
from qllm.plan.probed_experts import ProbedExperts
from qllm.plan.probed_models import Models, fit
from qllm.plan.random_model import random_linear
from qllm.plan.timing import undisturbed

# Bytes that a step goes through: what the caches of a core keep, what one that cores share may, and
# what none does. And the inputs and outputs of the matrices that they are made of: of the second,
# several, which tell what a call and a channel take from what a weight does.
WORKING_SETS = (1 << 20, 4 << 20, 16 << 20, 32 << 20, 64 << 20, 192 << 20)
SMALL: tuple[Size, ...] = ((256, 256), (256, 1024), (1024, 256), (1024, 1024))
# Of the first, and of those behind the second: of so many inputs, and of most others, 16-bit
# weights are read about as fast as those of an LM head; of 1536 they are read more slowly.
LEAST, LARGE = (1024, 256), (2048, 2048)
ROWS = {"decode": (1, 2, 4, 8, 16), "prefill": (1, 16, 128, 512)}
FORMAT = 22  # of what is found: what was kept in another is measured again
ROUNDS = 5  # of all measurements, in turns: a shared machine is slow for seconds at a time
SECONDS = 0.02  # that one measurement takes in a round at least


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
        self._models = Models(self._specs[len(self._specs) // 2], dtype, device)
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
            self._experts = ProbedExperts(dtype, device)
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
            for kind, run in self._experts.calls():
                self._experts.times[kind].append(median_seconds(run, self._device))
            self._models.measure()

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
        alone = dict.fromkeys(ROWS, 0.0)
        products = MeasuredSpeed(linears, {}, (0.0, *of_cache), {}, sets, alone)
        rest = self._models.rest(products)
        decode = rest["decode"]
        return MeasuredSpeed(
            linears,
            {
                name: (each.half, each.far_half, each.value, each.score, each.product)
                for name, each in rest.items()
            },
            (decode.byte, *of_cache),
            {name: (each.whole, each.sequence, each.logit) for name, each in rest.items()},
            sets,
            {name: each.among_others for name, each in rest.items()},
            self._experts.seconds(),
        )

    def _linear(self, spec: QuantSpec, name: str, rows: int) -> tuple[float, ...]:
        """Coefficients of `MeasuredSpeed.linears`."""
        least, small, *larger = WORKING_SETS
        features = [[1.0, sum(size), math.prod(size)] for size in SMALL]
        times = [self._seconds(spec, name, small, size, rows) for size in SMALL]
        call, channel, weight = fit(list(zip(features, times, [0.0] * len(times), strict=True)))

        def of_weight(nbytes: int, size: Size) -> float:
            seconds = self._seconds(spec, name, nbytes, size, rows)
            return (seconds - call - channel * sum(size)) / math.prod(size)

        decode = name == "decode"
        weights = [max(0.0, min(weight, of_weight(least, LEAST))) if decode else weight, weight]
        for nbytes in larger:
            each = of_weight(nbytes if decode else larger[-1], LARGE)
            weights.append(max(each, weights[-1]))
        return call, channel, *weights


def _products(spec: QuantSpec) -> Iterator[tuple[QuantSpec, str, int, Size, int]]:
    """The spec, phase, bytes, matrices' size and rows of all that is measured of a spec."""
    for name, counts in ROWS.items():
        least, small, *larger = WORKING_SETS
        sets = [(small, size) for size in SMALL]
        if name == "decode":
            sets += [(least, LEAST), *((each, LARGE) for each in larger)]
        else:  # from caches, and from memory: they take long
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
    """A call that multiplies with some matrices in turn, and their number.

    Of prompts, which take long, a call has two matrices, and the next one the next two: weights
    come from as far as they do in a model, whose prompts wait for them where products are fast.
    """
    x = torch.randn(rows, linears[0].in_features, dtype=dtype, device=device)
    in_turn = itertools.cycle(linears)
    count = min(2, len(linears)) if name == "prefill" else len(linears)

    def run() -> None:
        for linear in itertools.islice(in_turn, count):
            linear(x)

    def run_step() -> None:
        # Here, since a GPU's graph is captured when it is replayed first.
        with phase.decode():
            run()

    if name == "prefill":
        return run, count
    with torch.inference_mode():
        step = capture(run_step, torch.device(device), no_graph=None)  # as steps of decode are
    return step.replay, count


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
