"""Pipeline stages of one machine with unlike threads: what is predicted, beside what they take.

    python3 -m benchmarks.stages
    python3 -m benchmarks.stages --repository facebook/opt-125m --stages 1+2 2+1:9

At 4 bits, of the bundled OPT or of a published one's sizes with random weights: as many layers in
each stage, or stages that begin where it says behind a colon; and all of them in one process, which
says what of a miss is that of its layers. All rows are run in turn, in some rounds, and so is the
probe of each number of threads that they are predicted from: a shared machine's speed drifts from
minute to minute. The lower quartile is printed, as it is what of a probe's rounds counts, and in
brackets the least and the most. Prints a Markdown table and, last, one JSON line.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from qllm import cli, hub, ops
from qllm.cgroups import usable_cpus
from qllm.checkpoint.weights import Weights
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.parallel.pipeline import parse_cuts
from qllm.plan.devices import STAGE_PASSES, Cluster, Device
from qllm.plan.modules import decided_modules
from qllm.plan.network import measure_stages
from qllm.plan.probe import Matrices, Probe
from qllm.plan.program import build
from qllm.plan.shape import Shape, Workload
from qllm.plan.stages import time_stages
from qllm.plan.timing import undisturbed
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from tools.random_checkpoint import PUBLISHED, write_checkpoint

SPEC, DTYPE = QuantSpec.parse("4"), torch.float16
STAGES = ("1", "2", "1+1", "1+1:1", "1+2", "2+1", "2+2", "1+1+1", "1+1+1:1,2", "1+2+1", "1+1+1+1")


class Row(NamedTuple):
    """One of `--stages`: the threads of each, and the layers with which all but the first begin."""

    threads: tuple[int, ...]
    cuts: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, layers: int) -> Self:
        front, colon, back = text.partition(":")
        try:
            threads = tuple(map(int, front.split("+")))
            cuts = tuple(map(int, back.split(","))) if colon else None
        except ValueError:
            threads, cuts = (), None
        count = len(threads)
        if not threads or min(threads) < 1 or (colon and count == 1):
            raise UserError(f"--stages {text!r} is no N, N+N or N+N:LAYER")
        if cuts is None:
            cuts = tuple(round(layers * stage / count) for stage in range(1, count))
        if count > 1:
            parse_cuts(",".join(map(str, cuts)), layers, count)  # which says what is wrong
        return cls(threads, cuts)


class Probed:
    """This machine with a number of threads, measured in rounds."""

    def __init__(self, threads: int, matrices: Matrices) -> None:
        self.threads = threads
        self._probe = Probe([SPEC], DTYPE, "cpu", threads, matrices)
        self._stages: list[tuple[dict[str, float], dict[str, Any]]] = []

    def measure(self) -> None:
        """Another round."""
        self._probe.measure()
        self._stages.append(measure_stages(self.threads, DTYPE, self._probe.speed()))
        self._probe.measure()

    def device(self) -> Device:
        """As a plan would have it."""
        beside = {
            key: {
                name: statistics.median([found[key][name] for _, found in self._stages])
                for name in STAGE_PASSES
            }
            for key in ("stage_passes", "crowding")
        }
        contention = statistics.median([found["contention"] for _, found in self._stages])
        return Device(
            name=f"{self.threads}",
            memory=math.inf,
            speed=self._probe.speed(),
            kind="cpu",
            host="here",
            threads=self.threads,
            processors=usable_cpus(),
            **beside,
            contention=contention,
        )

    def network(self) -> dict[str, float]:
        """What joins two processes, as `Cluster` has it."""
        return {
            key: statistics.median([found[key] for found, _ in self._stages])
            for key in ("bandwidth", "latency")
        }


def predicted(
    shape: Shape,
    probed: Sequence[Device],
    cuts: Sequence[int],
    network: dict[str, float],
    work: Workload,
) -> tuple[float, float]:
    """Seconds of the prompts' pass and of a step.

    Args:
        probed: of each stage.
        cuts: of `Row`.
        network: of `Probed`.
    """
    devices = [replace(each, name=str(index)) for index, each in enumerate(probed)]
    cluster = Cluster(tuple(devices), **network)
    loss = np.zeros((len(shape.modules), 1))
    problem = build(shape, loss, [SPEC], cluster, devices, work, "latency")
    device = np.searchsorted(2 * np.array(cuts), np.arange(problem.halves), side="right")
    costs = problem.evaluate(np.zeros(len(shape.modules), dtype=np.int64), device)
    return costs.prefill, costs.decode


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--repository", choices=list(PUBLISHED), help="instead of the bundled OPT")
    parser.add_argument(
        "--stages",
        nargs="+",
        default=list(STAGES),
        metavar="N+N[:LAYER]",
        help="threads of each, and the layers with which all but the first begin",
    )
    number = cli.whole_number(1)
    parser.add_argument("--batch", nargs="+", type=number, default=[1, 4], metavar="N")
    parser.add_argument("--prompt", type=number, default=128, metavar="N")
    parser.add_argument("--gen", type=number, default=64, metavar="N")
    parser.add_argument("--rounds", type=number, default=3, metavar="N")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp_dir:
        source, folder = Path(tmp_dir) / "source", Path(tmp_dir) / "quantized"
        if args.repository:
            source.mkdir()
            write_checkpoint(source, PUBLISHED[args.repository])
        else:
            source = hub.find("opt-tiny").path
        quantize_checkpoint(Job(source, QuantPlan.uniform(SPEC), dtype=DTYPE), folder)
        modules = decided_modules(Weights.of_floats(source), False, False)
        shape = Shape.of(source, modules, [SPEC], DTYPE)
        rows = {text: Row.parse(text, shape.config.num_layers) for text in args.stages}
        cases = [
            (name, Workload(args.prompt, args.gen, batch)) for name in rows for batch in args.batch
        ]
        ops.prepare("cpu")
        matrices = Matrices(DTYPE, "cpu")
        counts = sorted({count for row in rows.values() for count in row.threads})
        probed = {count: Probed(count, matrices) for count in counts}
        runs: list[list[tuple[float, float]]] = [[] for _ in cases]
        for _ in range(args.rounds):
            for each in probed.values():
                each.measure()
            for (name, work), times in zip(cases, runs, strict=True):
                stages = ",".join(map(str, rows[name].cuts))
                times.append(time_stages(folder, stages, rows[name].threads, DTYPE, work))
    devices = {count: each.device() for count, each in probed.items()}
    columns = ["stages", "sequences", "prompt, ms: predicted", "measured"]
    print(f"| {' | '.join([*columns, 'step, ms: predicted', 'measured'])} |")
    print("|---|---|---|---|---|---|")
    found = []
    for (name, work), times in zip(cases, runs, strict=True):
        threads, cuts = rows[name]
        network = probed[threads[0]].network()
        said = predicted(shape, [devices[count] for count in threads], cuts, network, work)
        cells = [name, str(work.batch)]
        for seconds, each in zip(said, zip(*times, strict=True), strict=True):
            low, usual, high = (1e3 * f(each) for f in (min, undisturbed, max))
            cells += [f"{1e3 * seconds:.3g}", f"{usual:.3g} ({low:.3g} to {high:.3g})"]
        print("|", " | ".join(cells), "|", flush=True)
        found.append({"stages": name, "batch": work.batch, "predicted": said, "measured": times})
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
