"""What this machine takes for a linear and for the rest of a layer, measured."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from qllm.config import LM_HEAD, QuantSpec
from qllm.layers import Linear, linear_class
from qllm.models import Decoder, RawConfig, read_config
from qllm.ops import phase
from qllm.ops.capture import capture
from qllm.plan.candidates import key
from qllm.plan.devices import MeasuredSpeed, Size
from qllm.plan.program import Workload, sees_last_token
from qllm.plan.timing import time_generation, undisturbed

# Bytes that a step goes through, and the inputs and outputs of the matrices that they are made of:
# what the caches of a core keep, what one that cores share may, and what none does.
WORKING_SETS: tuple[tuple[int, tuple[Size, ...]], ...] = (
    (4 << 20, ((256, 256), (256, 1024), (1024, 256), (1024, 1024))),
    (16 << 20, ((1024, 1024),)),
    (48 << 20, ((1024, 1024),)),
    (192 << 20, ((2048, 2048),)),
)
ROWS = {"decode": (1, 4, 8, 16), "prefill": (16, 128, 512)}
FORMAT = 6  # of what is found: what was kept in another is measured again
ROUNDS = 5  # of all measurements, in turns: a shared machine is slow for seconds at a time
SECONDS = 0.03  # that one measurement takes in a round at least
# Of the models with which is measured what is beside the products: family, hidden size and layers.
FAMILIES = ("llama", "opt")  # the first of 16 bits
MODELS = ((256, 2), (256, 8), (1024, 4))
DECODES = ((1, 16), (1, 1024), (8, 16), (8, 256))  # sequences and the tokens of each
PROMPTS = (32, 256, 768)
STEPS = 50


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
    """

    def __init__(
        self,
        specs: Sequence[QuantSpec],
        dtype: torch.dtype,
        device: str,
        threads: int | None = None,
    ) -> None:
        self._specs = list({key(spec): spec for spec in (QuantSpec(), *specs)}.values())
        self._dtype, self._device = dtype, device
        self._threads = threads or torch.get_num_threads()
        # What surrounds products is not alike in families, nor around packed and dense ones: the
        # mean of some.
        specs = self._specs[0], self._specs[len(self._specs) // 2]
        self._models = {
            (family, spec, *sizes): _model(family, *sizes, spec, dtype, device)
            for family, spec in zip(FAMILIES, specs, strict=True)
            for sizes in MODELS
        }
        self._times: defaultdict[Hashable, list[float]] = defaultdict(list)
        with self._own_threads():
            self._products = {
                (spec, name, nbytes, size, rows): _product(linears, rows, dtype, device, name)
                for spec in self._specs
                for nbytes, sizes in WORKING_SETS
                for size in sizes
                for linears in [_copies(spec, size, nbytes, dtype, device)]
                for name, counts in ROWS.items()
                for rows in counts
            }

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
            for kind, model in self._models.items():
                for batch, context in DECODES:
                    _, step = time_generation(model, Workload(context, STEPS, batch), repeats=1)
                    self._times[kind, batch, context].append(step)
                for length in PROMPTS:
                    prompt, _ = time_generation(model, Workload(length, 1), repeats=1)
                    self._times[kind, length].append(prompt)

    def _seconds(self, *name: Hashable) -> float:
        return undisturbed(self._times[name])

    def speed(self) -> MeasuredSpeed:
        """What the rounds until now say."""
        linears: dict[str, dict] = {name: {} for name in ROWS}
        for spec in self._specs:
            for name, counts in ROWS.items():
                table = {str(rows): self._linear(spec, name, rows) for rows in counts}
                linears[name][key(spec)] = table
        sets = tuple(float(nbytes) for nbytes, _ in WORKING_SETS)
        rest = self._rest(MeasuredSpeed(linears, {}, {}, sets))
        halves = {name: (rest[name][1], rest[name][2], rest[name][3]) for name in ROWS}
        passes = {name: rest[name][0] for name in ROWS}
        return MeasuredSpeed(linears, halves, passes, sets)

    def _linear(self, spec: QuantSpec, name: str, rows: int) -> tuple[float, ...]:
        """Coefficients of `MeasuredSpeed.linears`."""
        (nbytes, sizes), *larger = WORKING_SETS
        features = [[1.0, sum(size), math.prod(size)] for size in sizes]
        times = [self._seconds(spec, name, nbytes, size, rows) for size in sizes]
        call, channel, weight = _fit(list(zip(features, times, [0.0] * len(times), strict=True)))
        weights = [weight]
        for nbytes, (size,) in larger:
            beside = call + channel * sum(size)
            each = (self._seconds(spec, name, nbytes, size, rows) - beside) / math.prod(size)
            weights.append(max(each, weights[-1]))
        return call, channel, *weights

    def _rest(self, products: MeasuredSpeed) -> dict[str, list[float]]:
        """What passes through small models take besides their products, by least squares.

        Returns:
            by phase, the seconds of a pass, and those of `MeasuredSpeed.halves`.
        """
        decode: list[tuple[list[float], float, float]] = []
        prefill: list[tuple[list[float], float, float]] = []
        for kind, model in self._models.items():
            _, spec, hidden, layers = kind
            count = 2 * layers
            for batch, context in DECODES:
                known = _products_of(model, spec, products, batch, batch, decoding=True)
                read = 2 * batch * context * hidden * self._dtype.itemsize
                features = [1.0, count, count * batch * hidden, layers * read]
                decode.append((features, self._seconds(kind, batch, context), known))
            for length in PROMPTS:
                known = _products_of(model, spec, products, length, 1, decoding=False)
                features = [1.0, count, count * length * hidden, layers * length**2 * hidden]
                prefill.append((features, self._seconds(kind, length), known))
        return {"decode": _fit(decode), "prefill": _fit(prefill)}


def _products_of(
    model: Decoder,
    spec: QuantSpec,
    products: MeasuredSpeed,
    rows: int,
    last_rows: int,
    *,
    decoding: bool,
) -> float:
    """Seconds of a model's linears, of which some see only each prompt's last token.

    Args:
        spec: of those in layers.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    held = float(sum(module.nbytes() for module in linears.values()))
    seconds = 0.0
    for name, module in linears.items():
        size = module.in_features, module.out_features
        n = last_rows if sees_last_token(name, model.config.num_layers) else rows
        own = QuantSpec() if name == LM_HEAD else spec
        seconds += products.linear(own, size, 0, n, decode=decoding, model=held)
    return seconds


def _copies(
    spec: QuantSpec, size: Size, nbytes: int, dtype: torch.dtype, device: str
) -> list[Linear]:
    """Matrices of random weights, as many as have the bytes together."""
    first = _linear(spec, size, dtype, device)
    # Each is laid out by itself, as those of a model are: copied, one would bring along the memory
    # of all that lie beside it.
    count = -(-nbytes // first.nbytes())
    return [first, *(_linear(spec, size, dtype, device) for _ in range(count - 1))]


def _linear(spec: QuantSpec, size: Size, dtype: torch.dtype, device: str) -> Linear:
    inputs, outputs = size
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
    linear = linear_class(spec).from_float(weight, None, spec, input_range=4.0)
    linear.process_weights_after_loading()
    return linear


def _product(
    linears: Sequence[Linear], rows: int, dtype: torch.dtype, device: str, name: str
) -> tuple[Callable[[], object], int]:
    """A call that multiplies with some matrices in turn, and their number."""
    if name == "prefill":  # bound by arithmetic: some matrices are as good as all
        linears = linears[:8]
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


def _fit(rows: Sequence[tuple[list[float], float, float]]) -> list[float]:
    """Coefficients, 0 or more, with which features and what is known add up to the seconds.

    What is missed counts by its share of a pass: that is what predictions are judged by.

    Args:
        rows: features, the seconds of a pass, and those of its products.
    """
    from scipy.optimize import nnls

    features = np.array([row for row, _, _ in rows])
    seconds, known = np.array([[whole, part] for _, whole, part in rows]).T
    weighed = features / seconds[:, None]
    scale = weighed.max(axis=0)
    return list(nnls(weighed / scale, 1 - known / seconds)[0] / scale)


def _model(
    family: str, hidden: int, layers: int, spec: QuantSpec, dtype: torch.dtype, device: str
) -> Decoder:
    """A model of these sizes with random weights, of one of FAMILIES.

    Args:
        spec: of the linears in layers.
    """
    raw = {
        "model_type": family,
        "vocab_size": 4 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,  # of Llama's three matrices
        "ffn_dim": 4 * hidden,  # of OPT's two
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    model = Decoder(read_config(RawConfig(raw, "the probe")), {}, dtype)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            fresh: Tensor = torch.randn(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(module, name, fresh * hidden**-0.5)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    for name, linear in linears.items():
        if name != LM_HEAD:
            size = linear.in_features, linear.out_features
            model.set_submodule(name, _linear(spec, size, dtype, device))
    for layer in model.layers:
        layer.fuse_norms()
    return model
