"""The stages of a plan, each a process of this machine, timed.

`time_stages` starts them as torchrun would, but each with the threads of its device: a plan may
be for unlike ones, and torchrun tells all of its processes the same.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qllm.checkpoint.load import load_model, outline
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import Decoder
from qllm.parallel.pipeline import parse_cuts
from qllm.parallel.session import ParallelConfig, session
from qllm.plan.program import Workload

REPEATS = 5
UNCOUNTED = 2  # steps behind a prompt: what they do is captured for those that follow
PATIENCE = 600.0  # seconds in which all have to be done
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class StagedRun:
    """What each process is told.

    Attributes:
        folder: of a checkpoint that is as it is to be run.
        stages: where they begin, as --stages has it.
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
        threads: of each stage's process.

    Returns:
        seconds of the prompts' pass and of a step, the median of some runs.

    Raises:
        UserError: a process failed.
    """
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    told = StagedRun(str(folder), stages, name, work.prompt, work.new, work.batch)
    command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(told))]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    world: dict[str, object] = {"WORLD_SIZE": len(threads), "LOCAL_WORLD_SIZE": len(threads)}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+") as said:
        processes: list[subprocess.Popen[str]] = []
        try:
            for rank, count in enumerate(threads):
                own = world | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": count}
                environment = os.environ | {key: str(value) for key, value in own.items()}
                out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                processes.append(
                    subprocess.Popen(command, stdout=out, stderr=said, env=environment, text=True)
                )
            answer, _ = processes[0].communicate(timeout=PATIENCE)
            codes = [process.wait(timeout=PATIENCE) for process in processes]
            failed = any(codes)
        except subprocess.TimeoutExpired:
            failed, answer = True, ""
        finally:
            for process in processes:
                process.kill()
        if failed:
            said.seek(0)
            lines = said.read().strip().splitlines() or ["it did not end in time"]
            raise UserError(f"the plan's stages could not be run here: {lines[-1]}")
    prefill, decode = json.loads(answer)
    return prefill, decode


def run(told: StagedRun) -> tuple[float, float]:
    """What each process does: all make the same calls, and the first one's times count."""
    count = told.stages.count(",") + 2
    folder, dense = Path(told.folder), QuantPlan.uniform(QuantSpec())
    dtype = None if told.dtype is None else getattr(torch, told.dtype)
    with session(ParallelConfig(pp=count)) as joined:
        joined.compare(asdict(told))
        layers = outline(folder, dense, dtype).config.num_layers
        parallel = joined.context(parse_cuts(told.stages, layers, count))
        model = load_model(folder, dense, dtype=dtype, parallel=parallel)
        draw = torch.Generator().manual_seed(0)
        size = (told.batch, told.prompt)
        prompts = torch.randint(model.config.vocab_size, size, generator=draw).tolist()
        asked = GenerationConfig(max_new_tokens=1 + UNCOUNTED + told.new)
        runs = [_run_once(model, prompts, asked) for _ in range(REPEATS)]
    return _times(np.array(runs))


def _run_once(
    model: Decoder, prompts: Sequence[Sequence[int]], asked: GenerationConfig
) -> list[float]:
    """Seconds of the first pass and of each step."""
    times = [time.perf_counter()]
    generate(model, prompts, asked, lambda *token: times.append(time.perf_counter()))
    # Rows get their tokens together: a pass ends with the last row's.
    return list(np.diff(times[:: len(prompts)]))


def _times(runs: NDArray[np.float64]) -> tuple[float, float]:
    """Of seconds (R, 1 + steps): the median first pass, and the median run's mean step."""
    return float(np.median(runs[:, 0])), float(np.median(runs[:, 1 + UNCOUNTED :].mean(axis=1)))


def main() -> None:
    """One process, which was told by its first argument."""
    found = run(StagedRun(**json.loads(sys.argv[1])))
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
