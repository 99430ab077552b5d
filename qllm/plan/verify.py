"""A plan that is run on this machine: what was predicted, beside what is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qllm.bench.runners import ModelRunner, Runner
from qllm.bench.speed import Case, seconds_of
from qllm.checkpoint.load import load_model, module_bytes
from qllm.config import QuantPlan, QuantSpec
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.plan.program import Workload
from qllm.quantizer.checkpoint import Job, quantize_checkpoint
from qllm.quantizer.layer import needs_inputs

REPEATS = 5


def verify(
    folder: Path,
    plan: QuantPlan,
    algorithm: str,
    samples: Sequence[Sequence[int]],
    judged: Sequence[Sequence[int]],
    dtype: torch.dtype | None,
    device: str,
    work: Workload | None,
) -> dict[str, float]:
    """Quantize and run a plan in this process.

    Args:
        algorithm: by which integers are chosen.
        samples, judged: what is calibrated on, and what divergence is measured on.
        work: whose passes are timed; None: none are.

    Returns:
        `divergence` from the model at 16 bits, nats per token; `bytes`; with `work`,
        `prefill_seconds` and `decode_seconds`, the fastest of some runs.
    """
    rules = tuple((pattern, _by(algorithm, spec)) for pattern, spec in plan.rules)
    chosen = replace(plan, rules=rules)
    with tempfile.TemporaryDirectory() as place:
        source = folder
        if rules:
            source = Path(place) / "quantized"
            inputs = samples if any(needs_inputs(spec) for _, spec in rules) else None
            quantize_checkpoint(Job(folder, chosen, samples=inputs, dtype=dtype), source)
        dense = QuantPlan.uniform(QuantSpec())
        reference = load_model(folder, dense, dtype=dtype, device=device)
        outputs = ReferenceOutputs.of(DecoderReference(reference), judged)
        model = load_model(source, dense, dtype=dtype, device=device)
        kl = agreement(model, outputs)["kl"]
        assert isinstance(kl, dict)
        found = {"divergence": kl["mean"], "bytes": float(module_bytes(model))}
        del reference, outputs
        if work is not None:
            runner, vocab = ModelRunner.of_decoder(model), model.config.vocab_size
            prompt = Case("pp", work.prompt, work.batch)
            found["prefill_seconds"] = _fastest(runner, prompt, vocab)
            step = Case("tg", work.new, work.batch)
            found["decode_seconds"] = _fastest(runner, step, vocab) / work.new
    return found


def _by(algorithm: str, spec: QuantSpec) -> QuantSpec:
    return replace(spec, algorithm=algorithm) if spec.kind == "weight_only" else spec


def _fastest(runner: Runner, case: Case, vocab_size: int) -> float:
    return min(seconds_of(runner, case, vocab_size) for _ in range(REPEATS))
