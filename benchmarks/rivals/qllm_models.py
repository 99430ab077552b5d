"""QLLM's own models in bfloat16, head and embedding at 8 bits where the layers are quantized."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.rivals.common import PREFILL_RUNS, Model, checkpoint, random_prompts
from qllm.bench.runners import read_bytes
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan, QuantSpec
from qllm.ops.cpu.limits import median_seconds

if TYPE_CHECKING:
    from benchmarks.rivals.interleaved import Settings

# And bits of the activations.
BITWIDTHS = (("16", 16), ("8:tc-li", 16), ("8", 16), ("4", 16), ("4", 8), ("3", 16))


def models(repository: str, settings: Settings, folder: Path, stack: ExitStack) -> Iterator[Model]:
    """One for each bitwidth; of a GGUF file, as it is and with activations of 8 bits.

    Args:
        folder: for the checkpoint, which stays.
        stack: has nothing to free.
    """
    torch.set_num_threads(settings.threads)
    kv_bits = settings.kv_bits
    if repository.endswith(".gguf"):
        for activation_bits in (16, 8):
            yield _model(
                Path(repository), "file", QuantPlan.parse("16"), activation_bits, kv_bits, None
            )
        return
    source = checkpoint(folder, repository, settings)
    for bitwidth, activation_bits in BITWIDTHS:
        if not settings.wants(bitwidth):
            continue
        plan = QuantPlan.parse(bitwidth)
        if bitwidth != "16":
            plan = plan.with_outer("8", "8", QuantSpec())
        yield _model(source, bitwidth, plan, activation_bits, kv_bits)


def _model(
    source: Path,
    bitwidth: str,
    plan: QuantPlan,
    activation_bits: int,
    kv_bits: int,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Model:
    model = load_model(source, plan, dtype=dtype, activation_bits=activation_bits, kv_bits=kv_bits)
    vocab = model.config.vocab_size

    def prefill(tokens: int) -> float:
        prompts = random_prompts(1, tokens, vocab).tolist()
        return median_seconds(lambda: model.prefill(prompts), PREFILL_RUNS)

    def decode(batch: int, context: int, steps: int) -> float:
        cache = model.new_cache(batch, context + steps + 1)
        logits = model.prefill(random_prompts(1, context, vocab).tolist(), cache, rows=[0])
        for part in itertools.chain.from_iterable(cache.layers):
            part[1:] = part[:1]  # Each is a copy, for speed does not depend on what is read.
        cache.advance(range(1, batch), [context] * (batch - 1))
        logits = logits.repeat(batch, 1)

        def step() -> None:
            nonlocal logits
            logits = model.decode(logits.argmax(-1), cache)

        return median_seconds(step, steps)

    name = f"QLLM {bitwidth}{'' if bitwidth in ('16', 'file') else ', head 8'}"
    name += ", activations 8" if activation_bits == 8 else ""
    name += f", KV {kv_bits}" if kv_bits < 16 else ""
    return Model(name, bitwidth, read_bytes(model), prefill, decode)
