"""A plan that is run on this machine: what was predicted, beside what is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qllm.checkpoint.load import load_model, module_bytes
from qllm.config import QuantPlan, QuantSpec
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.plan.planner import Plan
from qllm.plan.stages import time_stages
from qllm.plan.timing import time_generation
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.quantizer.layer import needs_inputs


def verify(
    folder: Path,
    plan: Plan,
    algorithm: str,
    samples: Sequence[Sequence[int]],
    judged: Sequence[Sequence[int]],
    dtype: torch.dtype | None,
    device: str,
) -> dict[str, float]:
    """Quantize and run a plan: in this process, and where it has stages, each in one of its own.

    Args:
        algorithm: by which integers are chosen.
        samples, judged: what is calibrated on, and what divergence is measured on.

    Returns:
        `divergence` from the model at 16 bits, nats per token; `bytes`; where the plan's devices
        are this machine's, `prefill_seconds` and `decode_seconds`, the median of some runs.
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
        if plan.is_here():
            work, stages = plan.planner.work, plan.stages
            if stages is not None:
                del model
                threads = [each.threads or 1 for each in plan.order]
                times = time_stages(source, stages, threads, dtype, work)
            else:
                times = time_generation(model, work)
            found["prefill_seconds"], found["decode_seconds"] = times
    return found


def _by(algorithm: str, spec: QuantSpec) -> QuantSpec:
    return replace(spec, algorithm=algorithm) if spec.kind == "weight_only" else spec
