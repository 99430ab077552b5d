"""The stages of a plan, each a process of this machine with its device's threads, timed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qllm.checkpoint.load import load_model, outline
from qllm.config import QuantPlan, QuantSpec
from qllm.parallel.pipeline import parse_cuts
from qllm.parallel.session import ParallelConfig, session
from qllm.plan.ranks import run_ranks
from qllm.plan.shape import Workload
from qllm.plan.timing import REPEATS, time_generation, undisturbed

SECONDS = 3.0  # in which runs are made: what disturbs a few short ones lasts as long


@dataclass(frozen=True)
class StagedRun:
    """What each process is told.

    Attributes:
        folder: of a checkpoint that is as it is to be run.
        stages: where they begin, as --stages has it; "": there is one.
        dtype: of activations, such as "float16"; None: the checkpoint's.
        prompt, new, batch: see `Workload`.
    """

    folder: str
    stages: str
    dtype: str | None
    prompt: int
    new: int
    batch: int


def time_stages(
    folder: Path, stages: str, threads: Sequence[int], dtype: torch.dtype | None, work: Workload
) -> tuple[float, float]:
    """Run a checkpoint in stages on the CPU.

    Args:
        stages: see `StagedRun`.
        threads: of each stage's process.

    Returns:
        seconds of the prompts' pass and of a step; see `time_generation`.

    Raises:
        UserError: a process failed.
    """
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    told = StagedRun(str(folder), stages, name, work.prompt, work.new, work.batch)
    answer = run_ranks(__spec__.name, asdict(told), threads, "the plan's stages")
    prefill, decode = json.loads(answer)
    return prefill, decode


def run(told: StagedRun) -> tuple[float, float]:
    """What each process does: all make the same calls, and the first one's times count."""
    count = told.stages.count(",") + 2 if told.stages else 1
    folder, dense = Path(told.folder), QuantPlan.uniform(QuantSpec())
    dtype = None if told.dtype is None else getattr(torch, told.dtype)
    with session(ParallelConfig(pp=count)) as joined:
        joined.compare(asdict(told))
        layers = outline(folder, dense, dtype).config.num_layers
        parallel = joined.context(parse_cuts(told.stages, layers, count) if told.stages else None)
        model = load_model(folder, dense, dtype=dtype, parallel=parallel)
        work, start = Workload(told.prompt, told.new, told.batch), time.perf_counter()
        runs: list[tuple[float, float]] = []
        while len(runs) < REPEATS or joined.broadcast(time.perf_counter() - start < SECONDS):
            runs.append(time_generation(model, work, repeats=1))
    prefill, decode = (undisturbed(each) for each in zip(*runs, strict=True))
    return prefill, decode


def main() -> None:
    """One process, which was told by its first argument."""
    found = run(StagedRun(**json.loads(sys.argv[1])))
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
