"""What this machine takes for a linear and for the rest of a layer, measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from qllm.config import QuantSpec
from qllm.layers import Linear, linear_class
from qllm.models import Decoder, RawConfig, read_config
from qllm.ops import phase
from qllm.ops.capture import capture
from qllm.plan.candidates import key
from qllm.plan.devices import MeasuredSpeed, Size
from qllm.plan.program import Workload
from qllm.plan.timing import time_generation

# Inputs and outputs of the matrices that are multiplied: those that caches keep, and a large one.
SIZES = ((256, 256), (256, 1024), (1024, 256), (1024, 1024))
LARGE = (2048, 2048)
DECODE_ROWS, PREFILL_ROWS = (1, 4, 8, 16), (16, 128, 512)
STREAMED = 192 << 20  # bytes of matrices that no cache keeps
CACHED = 4 << 20  # bytes that caches are taken to keep from one step to the next
FORMAT = 3  # of what is found: what was kept in another is measured again
SECONDS = 0.1  # that one measurement takes at least
# Of the models with which is measured what is beside the products: hidden size and layers.
MODELS = ((256, 2), (256, 8), (1024, 4))
BATCHES, CONTEXTS = (1, 8), (16, 1024)
PROMPTS = (32, 256, 768)
STEPS = 100


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
    wanted = list({key(spec): spec for spec in (QuantSpec(), *specs)}.values())
    linears: dict[str, dict] = {"decode": {}, "prefill": {}}
    for spec in progress(wanted):
        found = _linears(spec, dtype, device)
        for name, table in found.items():
            linears[name][key(spec)] = table
    speed = MeasuredSpeed(linears, {}, 0.0, float(CACHED))
    decode, prefill, steps = _halves(speed, dtype, device)
    return MeasuredSpeed(linears, {"decode": decode, "prefill": prefill}, steps, float(CACHED))


def _linears(
    spec: QuantSpec, dtype: torch.dtype, device: str
) -> dict[str, dict[str, tuple[float, ...]]]:
    """Coefficients of `MeasuredSpeed.linears`, by phase and rows."""
    cached = [[_linear(size, spec, dtype, device)] for size in SIZES]
    first = _linear(LARGE, spec, dtype, device)
    copies = max(2, -(-STREAMED // first.nbytes()))
    streamed = [first] + [_linear(LARGE, spec, dtype, device) for _ in range(copies - 1)]
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for name, counts in (("decode", DECODE_ROWS), ("prefill", PREFILL_ROWS)):
        found[name] = {}
        for rows in counts:
            # A product of many rows is bound by arithmetic: a few matrices are as good as many.
            far_linears = streamed if name == "decode" else streamed[:2]
            near = [_seconds_of(each, rows, dtype, device, name) for each in cached]
            features = [[1.0, sum(size), math.prod(size)] for size in SIZES]
            call, channel, weight = _fit(list(zip(features, near, [0.0] * len(near), strict=True)))
            far = _seconds_of(far_linears, rows, dtype, device, name)
            beside = call + channel * sum(LARGE)
            far_weight = max((far - beside) / math.prod(LARGE), weight)
            found[name][str(rows)] = (call, channel, weight, far_weight)
    return found


def _linear(size: Size, spec: QuantSpec, dtype: torch.dtype, device: str) -> Linear:
    inputs, outputs = size
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
    linear = linear_class(spec).from_float(weight, None, spec, input_range=4.0)
    linear.process_weights_after_loading()
    return linear


def _seconds_of(
    linears: Sequence[Linear], rows: int, dtype: torch.dtype, device: str, name: str
) -> float:
    """Seconds of a product, of some matrices in turn."""
    x = torch.randn(rows, linears[0].in_features, dtype=dtype, device=device)

    def run() -> None:
        for linear in linears:
            linear(x)

    if name == "prefill":
        return median_seconds(run, device) / len(linears)
    with torch.inference_mode(), phase.decode():
        step = capture(run, torch.device(device), alone=True)  # as steps of decode are
        return median_seconds(step.replay, device) / len(linears)


@torch.inference_mode()
def median_seconds(run: Callable[[], object], device: str) -> float:
    """Of the runs that fit into SECONDS, three at least, after one that is not counted.

    The fastest run of many is faster than those of a text are on the whole.
    """
    on_gpu = torch.device(device).type == "cuda"
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _halves(
    speed: MeasuredSpeed, dtype: torch.dtype, device: str
) -> tuple[tuple[float, float, float], tuple[float, float, float], float]:
    """What passes through small models take besides their products, by least squares."""
    decode: list[tuple[list[float], float, float]] = []
    prefill: list[tuple[list[float], float, float]] = []
    for hidden, layers in MODELS:
        model = _model(hidden, layers, dtype, device)
        linears = [m for m in model.modules() if isinstance(m, Linear)]
        sizes = [(m.in_features, m.out_features) for m in linears]
        held = float(sum(m.nbytes() for m in linears))
        count = 2 * layers

        def products(rows: int, head_rows: int, *, decoding: bool, of: list = sizes) -> float:
            """Of the layers' linears, and of the head, which is the last one."""
            each = [rows] * (len(of) - 1) + [head_rows]
            return sum(
                speed.linear(QuantSpec(), size, 0, r, decode=decoding, model=held)  # noqa: B023
                for size, r in zip(of, each, strict=True)
            )

        for batch in BATCHES:
            for context in CONTEXTS:
                work = Workload(context, STEPS, batch)
                _, seconds = time_generation(model, work, repeats=1)
                values, read = batch * hidden, 2 * batch * context * hidden * dtype.itemsize
                features = [1.0, count, count * values, layers * read]
                decode.append((features, seconds, products(batch, batch, decoding=True)))
        for length in PROMPTS:
            seconds, _ = time_generation(model, Workload(length, 1))
            features = [1.0, count, count * length * hidden, layers * length**2 * hidden]
            prefill.append((features, seconds, products(length, 1, decoding=False)))
    step = _fit(decode)
    prompt_pass = _fit(prefill)
    return (step[1], step[2], step[3]), (prompt_pass[1], prompt_pass[2], prompt_pass[3]), step[0]


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


def _model(hidden: int, layers: int, dtype: torch.dtype, device: str) -> Decoder:
    """A Llama of these sizes with random weights."""
    raw = {
        "model_type": "llama",
        "vocab_size": 4 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
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
    return model
