"""Pipeline stages of one machine with unlike threads: what is predicted, beside what they take.

    OMP_NUM_THREADS=1 python3 qllm_plan.py --probe --bits 4,8 -o one.json
    OMP_NUM_THREADS=2 python3 qllm_plan.py --probe --bits 4,8 -o two.json
    python3 -m benchmarks.stages one.json two.json
    python3 -m benchmarks.stages one.json two.json --repository facebook/opt-125m --stages 1+2 2+1

At 4 bits, as many layers in each stage, of the bundled OPT or of a published one's sizes with
random weights. All rows are run in turn, in some rounds: the median is printed, and in brackets the
least and the most. Prints a Markdown table and, last, one JSON line.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from qllm import cli, hub
from qllm.checkpoint.weights import Weights
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.plan.devices import Cluster
from qllm.plan.measure import decided_modules
from qllm.plan.program import Shape, Workload, build
from qllm.plan.stages import time_stages
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from tools.random_checkpoint import PUBLISHED, write_checkpoint

SPEC, DTYPE = QuantSpec.parse("4"), torch.float16
THREADS = ("1+1", "1+2", "2+1", "2+2", "1+1+1", "1+2+1", "1+1+1+1")


def cuts_of(layers: int, stages: int) -> list[int]:
    """The layers with which stages but the first begin."""
    return [round(layers * stage / stages) for stage in range(1, stages)]


def predicted(
    shape: Shape, probed: dict[int, Cluster], threads: Sequence[int], work: Workload
) -> tuple[float, float]:
    """Seconds of the prompts' pass and of a step."""
    first = probed[threads[0]]
    devices = [replace(probed[count].devices[0], name=str(i)) for i, count in enumerate(threads)]
    cluster = replace(first, devices=tuple(devices))
    loss = np.zeros((len(shape.modules), 1))
    problem = build(shape, loss, [SPEC], cluster, devices, work, "latency")
    cuts = [2 * cut for cut in cuts_of(shape.config.num_layers, len(threads))]
    device = np.searchsorted(np.array(cuts), np.arange(problem.halves), side="right")
    costs = problem.evaluate(np.zeros(len(shape.modules), dtype=np.int64), device)
    return costs.prefill, costs.decode


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("probes", nargs="+", metavar="FILE", help="of --probe, with other threads")
    parser.add_argument("--repository", choices=list(PUBLISHED), help="instead of the bundled OPT")
    parser.add_argument(
        "--stages", nargs="+", default=list(THREADS), metavar="N+N", help="threads of each"
    )
    number = cli.whole_number(1)
    parser.add_argument("--batch", nargs="+", type=number, default=[1, 4], metavar="N")
    parser.add_argument("--prompt", type=number, default=128, metavar="N")
    parser.add_argument("--gen", type=number, default=64, metavar="N")
    parser.add_argument("--rounds", type=number, default=3, metavar="N")
    args = parser.parse_args()
    clusters = [Cluster.from_file(Path(name)) for name in args.probes]
    probed = {each.devices[0].threads or 1: each for each in clusters}
    rows = [tuple(map(int, text.split("+"))) for text in args.stages]
    if unknown := {count for row in rows for count in row} - set(probed):
        raise UserError(f"there is no probe with {min(unknown)} threads; see --help")
    with tempfile.TemporaryDirectory() as place:
        source, folder = Path(place) / "source", Path(place) / "quantized"
        if args.repository:
            source.mkdir()
            write_checkpoint(source, PUBLISHED[args.repository])
        else:
            source = hub.find("opt-tiny").path
        quantize_checkpoint(Job(source, QuantPlan.uniform(SPEC), dtype=DTYPE), folder)
        modules = decided_modules(Weights.of_floats(source), False, False)
        shape = Shape.of(source, modules, [SPEC], DTYPE)
        cases = [
            (row, Workload(args.prompt, args.gen, batch)) for row in rows for batch in args.batch
        ]
        runs: list[list[tuple[float, float]]] = [[] for _ in cases]
        for _ in range(args.rounds):
            for (row, work), times in zip(cases, runs, strict=True):
                layers = cuts_of(shape.config.num_layers, len(row))
                stages = ",".join(map(str, layers))
                times.append(time_stages(folder, stages, row, DTYPE, work))
    columns = ["threads", "sequences", "prompt, ms: predicted", "measured"]
    print(f"| {' | '.join([*columns, 'step, ms: predicted', 'measured'])} |")
    print("|---|---|---|---|---|---|")
    found = []
    for (row, work), times in zip(cases, runs, strict=True):
        said = predicted(shape, probed, row, work)
        name = "+".join(map(str, row))
        cells = [name, str(work.batch)]
        for seconds, each in zip(said, zip(*times, strict=True), strict=True):
            low, middle, high = (1e3 * f(each) for f in (min, statistics.median, max))
            cells += [f"{1e3 * seconds:.3g}", f"{middle:.3g} ({low:.3g} to {high:.3g})"]
        print("|", " | ".join(cells), "|", flush=True)
        found.append({"threads": name, "batch": work.batch, "predicted": said, "measured": times})
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
