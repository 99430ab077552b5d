"""What it takes to hand activations from one process of this machine to another, measured."""

from __future__ import annotations

import json
import os
import statistics
import time

import torch

from qllm.parallel.pipeline import PipelineStage
from qllm.parallel.session import ParallelConfig, session
from qllm.plan.ranks import run_ranks

SMALL, LARGE = 256, 1 << 20  # activations of a step, and of prompts, in float16
ROUNDS = 200, 8


def measure_network() -> dict[str, float]:
    """Two stages play a message back and forth.

    Returns:
        `bandwidth` in bits per second and `latency` in seconds, as in a cluster's file.

    Raises:
        UserError: a process failed.
    """
    small, large = json.loads(run_ranks(__spec__.name, {}, [1, 1], "two processes"))
    bandwidth = (LARGE - SMALL) * 16 / max(large - small, 1e-9)
    return {"bandwidth": bandwidth, "latency": small}


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


def main() -> None:
    """One of the processes."""
    with session(ParallelConfig(pp=2)) as joined:
        joined.compare({})
        stage = PipelineStage(joined.pp)
        found = [_hop(stage, *job) for job in zip((SMALL, LARGE), ROUNDS, strict=True)]
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
