"""A plan that is run on this machine: what was predicted, beside what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qllm.checkpoint.load import load_model, module_bytes
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import WritingError
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.plan.devices import Device, MeasuredSpeed
from qllm.plan.network import measure_stages
from qllm.plan.planner import Plan
from qllm.plan.probe import ROUNDS, Matrices, Probe
from qllm.plan.stages import time_stages
from qllm.plan.timing import time_generation, undisturbed
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.quantizer.layer import needs_inputs
from qllm.temporary import scratch_folder

TIMES = ("prefill_seconds", "decode_seconds")


@dataclass(frozen=True)
class Verified:
    """What became of a plan.

    Attributes:
        measured: `divergence` from the model at 16 bits, nats per token; `bytes`; and where the
            plan's devices are this machine's, TIMES, see `undisturbed`.
        probed: TIMES, where those were measured, as they are predicted from a probe whose rounds
            took turns with the runs (of stages: before and behind them). A shared machine's speed
            drifts: what the plan's own probe misses by it, and what the prediction itself does, is
            told apart by them.
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
    with scratch_folder("verify") as scratch:
        source = folder
        if rules:
            source = scratch / "quantized"
            inputs = samples if any(needs_inputs(spec) for _, spec in rules) else None
            job = Job(folder, chosen, samples=inputs, dtype=dtype, device=device)
            try:
                quantize_checkpoint(job, source)
            except WritingError as error:
                raise WritingError(f"{error} with TMPDIR") from None
        dense = QuantPlan.uniform(QuantSpec())
        reference = load_model(folder, dense, dtype=dtype, device=device)
        outputs = ReferenceOutputs.of(DecoderReference(reference), judged)
        model = load_model(source, dense, dtype=dtype, device=device)
        kl = agreement(model, outputs)["kl"]
        assert isinstance(kl, dict)
        # Of several stages the first has a tied embedding as well as the last.
        copied = module_bytes(model.embed) if plan.cuts and model.config.tied_head else 0
        found = {"divergence": kl["mean"], "bytes": float(module_bytes(model) + copied)}
        del reference, outputs
        if not plan.is_here():
            return Verified(found, {})
        work, stages = plan.planner.work, plan.stages
        now = _Now(plan, dtype, device)
        if stages is not None:
            del model
            now.measure(ROUNDS // 2)
            threads = [each.threads or 1 for each in plan.order]
            times = time_stages(source, stages, threads, dtype, work)
            now.measure(ROUNDS - ROUNDS // 2)
        else:
            runs = []
            for _ in range(ROUNDS):
                now.measure(1)
                runs.append(time_generation(model, work, repeats=2))
            prefill, decode = (undisturbed(each) for each in zip(*runs, strict=True))
            times = prefill, decode
    found |= dict(zip(TIMES, times, strict=True))
    return Verified(found, dict(zip(TIMES, now.seconds(), strict=True)))


class _Now:
    """What a plan takes on its devices by a probe of these minutes, of what the plan has."""

    def __init__(self, plan: Plan, dtype: torch.dtype | None, device: str) -> None:
        specs, given = list(plan.specs.values()), dtype or torch.float16
        self._plan, self._dtype = plan, given
        matrices = Matrices(given, device)
        self._probes = {
            threads: Probe(specs, given, device, threads, matrices)
            for threads in {each.threads for each in plan.order}
        }

    def measure(self, rounds: int) -> None:
        for _ in range(rounds):
            for probe in self._probes.values():
                probe.measure()

    def seconds(self) -> tuple[float, float]:
        speeds = {threads: probe.speed() for threads, probe in self._probes.items()}
        devices = [_as_it_is_now(each, speeds[each.threads]) for each in self._plan.order]
        if self._plan.stages is not None:
            beside = {
                threads: measure_stages(threads or 1, self._dtype, speed)[1]
                for threads, speed in speeds.items()
            }
            for index, device in enumerate(devices):
                found = beside[device.threads]
                devices[index] = replace(device, **found)
        return self._plan.seconds_on(devices)


def _as_it_is_now(device: Device, speed: MeasuredSpeed) -> Device:
    """A device as it was measured anew; products that the plan has none of stay as they were."""
    assert isinstance(device.speed, MeasuredSpeed)
    before = device.speed.linears
    linears = {phase: {**before[phase], **speed.linears[phase]} for phase in before}
    return replace(device, speed=replace(speed, linears=linears))


def _by(algorithm: str, spec: QuantSpec) -> QuantSpec:
    return replace(spec, algorithm=algorithm) if spec.kind == "weight_only" else spec
