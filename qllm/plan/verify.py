"""A plan that is run on this machine: what was predicted, beside what is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qllm.checkpoint.load import load_model, module_bytes
from qllm.config import QuantPlan, QuantSpec
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.plan.devices import Speed
from qllm.plan.planner import Plan
from qllm.plan.probe import probe
from qllm.plan.stages import time_stages
from qllm.plan.timing import time_generation
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.quantizer.layer import needs_inputs

TIMES = ("prefill_seconds", "decode_seconds")


@dataclass(frozen=True)
class Verified:
    """What became of a plan.

    Attributes:
        measured: `divergence` from the model at 16 bits, nats per token; `bytes`; and where the
            plan's devices are this machine's, TIMES, medians of some runs.
        probed: TIMES as they are predicted from a probe before the run and one behind it, where
            those were measured. A shared machine's speed drifts: what the plan's own probe
            misses by it, and what the prediction itself does, is told apart by them.
    """

    measured: dict[str, float]
    probed: dict[str, float]


def verify(
    folder: Path,
    plan: Plan,
    algorithm: str,
    samples: Sequence[Sequence[int]],
    judged: Sequence[Sequence[int]],
    dtype: torch.dtype | None,
    device: str,
) -> Verified:
    """Quantize and run a plan: in this process, and where it has stages, each in one of its own.

    Args:
        algorithm: by which integers are chosen.
        samples, judged: what is calibrated on, and what divergence is measured on.
    """
    rules = tuple((pattern, _by(algorithm, spec)) for pattern, spec in plan.quant_plan.rules)
    chosen = replace(plan.quant_plan, rules=rules)
    with tempfile.TemporaryDirectory() as place:
        source = folder
        if rules:
            source = Path(place) / "quantized"
            inputs = samples if any(needs_inputs(spec) for _, spec in rules) else None
            job = Job(folder, chosen, samples=inputs, dtype=dtype, device=device)
            quantize_checkpoint(job, source)
        dense = QuantPlan.uniform(QuantSpec())
        reference = load_model(folder, dense, dtype=dtype, device=device)
        outputs = ReferenceOutputs.of(DecoderReference(reference), judged)
        model = load_model(source, dense, dtype=dtype, device=device)
        kl = agreement(model, outputs)["kl"]
        assert isinstance(kl, dict)
        copies = plan.planner.shape.tied if plan.cuts else 0  # which the last stage has
        found = {"divergence": kl["mean"], "bytes": float(module_bytes(model) + copies)}
        del reference, outputs
        if not plan.is_here():
            return Verified(found, {})
        work, stages = plan.planner.work, plan.stages
        before = _seconds_now(plan, dtype, device)
        if stages is not None:
            del model
            threads = [each.threads or 1 for each in plan.order]
            times = time_stages(source, stages, threads, dtype, work)
        else:
            times = time_generation(model, work)
        now = np.mean([before, _seconds_now(plan, dtype, device)], axis=0)
    found |= dict(zip(TIMES, times, strict=True))
    return Verified(found, dict(zip(TIMES, map(float, now), strict=True)))


def _seconds_now(plan: Plan, dtype: torch.dtype | None, device: str) -> tuple[float, float]:
    """What the prompts and a step take by a probe of this minute, of what the plan has."""
    specs, count = list(plan.specs.values()), torch.get_num_threads()
    speeds: dict[int | None, Speed] = {}
    try:
        for threads in {each.threads for each in plan.order}:
            if threads is not None:
                torch.set_num_threads(threads)
            speeds[threads] = probe(specs, dtype or torch.float16, device)
    finally:
        torch.set_num_threads(count)
    return plan.seconds_on([replace(each, speed=speeds[each.threads]) for each in plan.order])


def _by(algorithm: str, spec: QuantSpec) -> QuantSpec:
    return replace(spec, algorithm=algorithm) if spec.kind == "weight_only" else spec
