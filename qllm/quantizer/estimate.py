"""What quantizing a checkpoint will take: memory, and which share of the time each step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qllm.checkpoint.load import elements, module_bytes
from qllm.config import QuantSpec
from qllm.models import Decoder
from qllm.models.mlp import inner_channels
from qllm.quantizer import fisher
from qllm.quantizer.distill import LOGITS_AT_ONCE
from qllm.quantizer.hidden import beside_states
from qllm.quantizer.job import Job
from qllm.quantizer.layer import observed_bytes
from qllm.quantizer.tune import TOKENS_PER_PASS
from qllm.quantizer.workers import workers_on

# What a sample's way through the float model takes, in those of a step of tuning: it is read anew,
# goes through each layer once more, and through the head (1.7 for the bundled OPT, 2.5 for a model
# of 135 million weights).
FLOAT_PASS = 2


def bytes_needed(
    job: Job,
    model: Decoder,
    specs: Mapping[str, QuantSpec],
    dtype: torch.dtype,
    *,
    tuning: bool,
) -> int:
    """About what calibration has in memory at its peak.

    Args:
        job: one with samples.
        model: in float32, on the meta device.
        specs: of each linear, by its name in the model.
        dtype: that hidden states are kept in between layers.
        tuning: any layer is tuned.
    """
    assert job.samples is not None
    config, length = model.config, len(job.samples[0])
    channels = config.hidden_size + sum(beside_states(config).values())
    hidden = len(job.samples) * length * channels * dtype.itemsize
    layer = max(module_bytes(layer) for layer in model.layers)
    front = 0
    if tuning:
        # The targets, and the inputs for both ways; a tuned weight has what it starts from, an
        # offset, a gradient, its average and what it is now, and each token of a pass what
        # gradients are computed from.
        hidden *= 3
        widest = inner_channels(config) + config.hidden_size
        tokens = max(TOKENS_PER_PASS, length)
        # In front of that a pass has the states behind every half of a layer, the head in its own
        # type and in bfloat16, and logits.
        front = 8 * tokens * config.hidden_size * config.num_layers
        front += 4 * config.vocab_size * config.embed_size
        front += 4 * 4 * min(LOGITS_AT_ONCE, tokens * config.vocab_size)
        front += layer
        # Each worker has a gradient of its own, and tokens.
        workers = workers_on(torch.device(job.device))
        batch = job.options.tune.samples(length, config.hidden_size) * length
        tokens = max(tokens, min(workers * tokens, batch))
        layer = (3 + workers) * layer + tokens * 4 * (8 * widest + config.num_heads * length)
    # The sum of x x^T of the widest input, its order, root and reversal; of experts, several sums.
    widest = max(config.hidden_size, config.intermediate_size)
    several = 0
    for index, each in enumerate(model.layers if config.experts else ()):
        start = f"layers.{index}."
        own = {n.removeprefix(start): s for n, s in specs.items() if n.startswith(start)}
        several = max(several, observed_bytes(each, own, job.options))
    return hidden + max(front, 2 * layer + 4 * 4 * widest**2 + several)


def step_sizes(
    job: Job, model: Decoder, itemsize: int, *, tuning: bool, distilling: bool
) -> list[int]:
    """Bytes of the checkpoint that each step quantizes: what is only copied takes no time.

    Args:
        model: on the meta device.
        itemsize: of the checkpoint's weights.
        tuning, distilling: any layer is tuned, and all scales behind them.
    """
    layers = [elements(layer) * itemsize for layer in model.layers]
    if not tuning:
        return [0, *layers, 0]
    assert job.samples is not None  # without which no layer is tuned
    tune, distill, channels = job.options.tune, job.options.distill, model.config.hidden_size
    # A step of either goes through the model once and back, as what is in front of it does.
    sizes = len(job.samples[0]), channels
    each = sum(layers) / (tune.steps * tune.samples(*sizes))
    scales = [round(distill.steps * distill.samples(*sizes) * each)] * distilling
    front = FLOAT_PASS * len(fisher.seen_samples(job.samples, channels))
    return [round(front * each), *layers, 0, *scales]
