"""What processes of this machine take that share a model, measured beside one that has it alone."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time

import torch

from qllm.config import QuantSpec
from qllm.parallel.pipeline import PipelineStage
from qllm.parallel.session import ParallelConfig, Session, session
from qllm.plan.probe import random_decoder
from qllm.plan.program import Workload
from qllm.plan.ranks import run_ranks
from qllm.plan.timing import time_generation, undisturbed

SMALL, LARGE = 256, 1 << 20  # activations of a step, and of prompts, in float16
ROUNDS = 200, 8
# The model whose stages take turns, and what it is asked: its steps take a fraction of a
# millisecond, of which a turn's part is large.
FAMILY, SIZES = ("opt", 32, 1), (256, 6)
WORK = Workload(prompt=64, new=50)
TURNS = 40  # rounds of the whole model and of its stages, of some 50 ms each


def measure_stages(threads: int, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Two processes play a message back and forth, then are the stages of a model.

    Args:
        threads: of each.

    Returns:
        `bandwidth` in bits per second and `latency` in seconds, as in a cluster's file; and
        "prefill" and "decode" to the seconds that a stage takes more than its part of a model in
        one process, besides handing on: its threads were asleep, or others have its processors.

    Raises:
        UserError: a process failed.
    """
    told = {"dtype": str(dtype).removeprefix("torch.")}
    said = json.loads(run_ranks(__spec__.name, told, [threads] * 2, "two processes"))
    (small, large), alone, shared = (said[name] for name in ("hops", "alone", "shared"))
    network = {"bandwidth": (LARGE - SMALL) * 16 / max(large - small, 1e-9), "latency": small}
    hops = {"prefill": small, "decode": 2 * small}  # the last stage tells the other one its tokens
    turns = {phase: max(0.0, shared[phase] - alone[phase] - hops[phase]) / 2 for phase in hops}
    return network, turns


def _hop(stage: PipelineStage, values: int, rounds: int) -> float:
    """Median seconds of a message's way."""
    x = torch.zeros(1, values, dtype=torch.float16)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        if stage.first:
            stage.send(x)
        else:
            stage.recv(x)
        stage.broadcast(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / 2


def _passes(joined: Session, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Seconds of a pass of each phase, "alone" in one process with all layers, "shared" by two."""
    spec = QuantSpec.parse("4")
    whole, part = (
        random_decoder(*FAMILY, *SIZES, spec, dtype, "cpu", parallel)
        for parallel in (None, joined.context())
    )
    alone, shared = [], []
    for _ in range(TURNS):
        alone.append(time_generation(whole, WORK, repeats=1) if joined.rank == 0 else (0.0, 0.0))
        shared.append(time_generation(part, WORK, repeats=1))  # the other process waits for this
    found = {}
    for name, runs in (("alone", alone), ("shared", shared)):
        prefill, decode = (undisturbed(each) for each in zip(*runs, strict=True))
        found[name] = {"prefill": prefill, "decode": decode}
    return found


def main() -> None:
    """One of the processes, which was told by its first argument."""
    told = json.loads(sys.argv[1])
    with session(ParallelConfig(pp=2)) as joined:
        joined.compare(told)
        stage = PipelineStage(joined.pp)
        hops = [_hop(stage, *job) for job in zip((SMALL, LARGE), ROUNDS, strict=True)]
        found = {"hops": hops, **_passes(joined, getattr(torch, told["dtype"]))}
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
