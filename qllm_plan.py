"""Decide how many bits each linear gets, and which layers each device, for the least loss or time.

    python3 qllm_plan.py --model-size tiny --avg-bits 3.5 --dataset FILE -o plan.json
    python3 qllm_plan.py --model-size tiny --max-kl 0.001 --dataset FILE -o plan.json
    python3 qllm_plan.py --model-size tiny --size 4.6MB --embedding --dataset FILE -o plan.json
    python3 qllm_plan.py --model-size tiny --memory 40MB --objective latency --dataset FILE
    python3 qllm_plan.py --model-size tiny --cluster cluster.json --dataset FILE -o plan.json
    python3 qllm_plan.py --model-size tiny --pareto --dataset FILE --plot front.png
    python3 qllm_plan.py --probe -o here.json

What each linear's bits cost is measured once per model and text, one layer in memory at a time, and
kept: the next plan takes seconds. `qllm_quant.py --config plan.json` and `qllm_gen.py --bitwidth
plan.json` take what is written.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qllm import cli
from qllm.cli import planning
from qllm.config import QuantSpec

if TYPE_CHECKING:
    from qllm.hub import ModelFolder
    from qllm.plan.devices import Cluster
    from qllm.plan.planner import Limits, Plan, Planner
    from qllm.plan.sensitivity import Sensitivity
    from qllm.plan.verify import Verified

BITS = "2,3,4,5,6,8"
ALGORITHMS = ("gptq", "rtn")
DATASET, SAMPLES = "wikitext2", 128
OBJECTIVES = ("loss", "latency", "throughput")
FRONT_POINTS = 13
TIME_LIMIT = 60.0


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_model_options(parser)
    group = parser.add_argument_group("what there is to choose from")
    group.add_argument("--bits", default=BITS, metavar="LIST", help="candidates (%(default)s)")
    default = QuantSpec()
    group.add_argument(
        "--group-size",
        default=str(default.group_size),
        metavar="N",
        help="or several to choose from, as 64,128,-1 (%(default)s)",
    )
    group.add_argument(
        "--scheme", default=default.scheme, metavar="NAMES", help="sym, asym or both (%(default)s)"
    )
    group.add_argument(
        "--algorithm",
        choices=ALGORITHMS,
        default=cli.DefaultName("gptq"),
        help="that will quantize (%(default)s)",
    )
    group.add_argument("--lm-head", action="store_true", help="decide on the LM head, too")
    group.add_argument(
        "--embedding",
        action="store_true",
        help="decide on the token embedding, too, and on an LM head that is tied to it",
    )
    group.add_argument(
        "--fixed",
        action="append",
        default=[],
        metavar="REGEX=BITS",
        help="hold the linears whose names match, such as layers.0.mlp.up (several times: the last "
        "counts)",
    )
    group = parser.add_argument_group("limits and objective")
    group.add_argument(
        "--avg-bits",
        type=float,
        metavar="BITS",
        help="at most, per weight, scales and zeros included",
    )
    group.add_argument(
        "--max-kl", type=float, metavar="NATS", help="divergence from 16 bits, at most, per token"
    )
    group.add_argument("--size", metavar="BYTES", help="of all weights, at most, such as 400MB")
    group.add_argument("--memory", metavar="BYTES", help="of this machine, such as 6GB")
    group.add_argument("--cluster", metavar="FILE", help="devices and what joins them; see --probe")
    group.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="loss, latency or throughput (loss; with --max-kl alone the fewest bytes)",
    )
    number = cli.whole_number(1)
    group.add_argument(
        "--prompt", type=number, metavar="N", help="(512, or what the model's window leaves)"
    )
    group.add_argument(
        "--gen", type=number, metavar="N", help="(128, or half of the model's window)"
    )
    group.add_argument(
        "--batch", type=number, default=cli.Default(1), metavar="N", help="(%(default)s)"
    )
    group.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help=f"of the solver ({TIME_LIMIT:g})"
    )
    cli.add_calibration_options(parser, DATASET, str(SAMPLES), "2048, or the model's window")
    cli.add_run_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", help="the plan; with --probe, the device")
    group.add_argument("--table", metavar="FILE", help="of losses: read, or made (QLLM's folder)")
    group.add_argument("--probe", action="store_true", help="measure this machine instead")
    group.add_argument("--pareto", action="store_true", help="the whole front of plans")
    group.add_argument("--plot", metavar="FILE", help="draw the front (.png, .svg, .pdf)")
    group.add_argument(
        "--verify", action="store_true", help="quantize and run the plan here, and print both"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    planning.check_options(args)
    device = cli.resolve_device(args)
    if args.probe:
        write_probe(args, device)
        return
    from qllm.plan.cluster_file import parse_bytes

    size = None if args.size is None else parse_bytes(args.size, "--size")
    candidates, fixed = planning.read_candidates(args), planning.read_fixed(args)
    devices = planning.read_devices(args)
    folder = cli.resolve_model(args)

    from qllm import report
    from qllm.checkpoint.weights import Weights
    from qllm.plan.modules import decided_modules
    from qllm.plan.planner import Planner, allowed
    from qllm.plan.possible import Asked
    from qllm.plan.shape import Shape, Workload

    weights = Weights.of_floats(folder.path)
    modules = decided_modules(weights, args.lm_head, args.embedding)
    mask = allowed(modules, candidates, fixed, config=weights.config)
    kind = device.partition(":")[0]
    given = (folder.path, modules, candidates, cli.resolve_dtype(args), kind)
    shape = Shape.of(*given)
    work = Workload.within(shape.config.max_positions, args.prompt, args.gen, args.batch)
    memory = [size or math.inf] if devices is None else [each.memory for each in devices.devices]
    option = planning.memory_option(args)
    is_tied, is_fixed = weights.config.tied_head, bool(fixed)
    asked = Asked(shape, is_tied, work, candidates, mask, is_fixed, memory, option)
    asked.check(args.avg_bits)
    cluster = measure_devices(args, devices, device)
    samples, judged = read_samples(args, folder)
    sensitivity = find_table(args, folder, candidates, samples, judged, device)
    if sensitivity.float32_scales.any():
        shape = Shape.of(*given, sensitivity.float32_scales)
        replace(asked, shape=shape).check(args.avg_bits)
    planner = Planner(sensitivity, shape, work, cluster, size, mask, option)
    limits = read_limits(args, planner)
    result: dict[str, object] = {
        "model": folder.name,
        "fit": {"power": planner.fit.power, "error": planner.fit.error},
    }
    if args.pareto:
        result["front"] = show_front(args, folder, planner, limits)
    else:
        plan = show_plan(args, folder, planner, limits)
        result["plan"] = plan.to_json()
        if args.verify:
            found = check(args, folder, plan, samples, judged, device)
            result |= {"measured": found.measured, "probed": found.probed}
    if args.json:
        cli.print_json(report.finite(result))


def measure_devices(
    args: argparse.Namespace, devices: Cluster | None, device: str
) -> Cluster | None:
    """The same with this machine's speed, as it was probed, where --memory stands for it."""
    if devices is None or not args.memory:
        return devices
    from qllm.plan.cached import this_machine

    specs, dtype = planning.read_candidates(args), cli.resolve_dtype(args)
    here = this_machine(specs, dtype, device, cli.progress("measuring"), cli.note)
    return replace(devices, devices=(replace(here, memory=devices.devices[0].memory),))


def write_probe(args: argparse.Namespace, device: str) -> None:
    """Measure this machine for --cluster."""
    from qllm.checkpoint.writer import write_json
    from qllm.plan.cached import describe_machine

    specs, dtype = planning.read_candidates(args), cli.resolve_dtype(args)
    machine = describe_machine(specs, dtype, device, cli.progress("measuring"))
    write_json(Path(args.output), machine)
    if not args.json:
        print(f"what this machine does is written to {args.output}")


def read_samples(
    args: argparse.Namespace, folder: ModelFolder
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of the text that Hessians are made of, and others to measure divergence on."""
    from qllm.plan.samples import draw_samples

    dataset, count = args.dataset or DATASET, args.nsamples or SAMPLES
    if args.dataset is None:
        cli.note(f"measuring on {dataset}; --dataset names another text")
    return draw_samples(folder.path, dataset, count, args.seqlen, args.seed)


def find_table(
    args: argparse.Namespace,
    folder: ModelFolder,
    candidates: tuple[QuantSpec, ...],
    samples: list[list[int]],
    judged: list[list[int]],
    device: str,
) -> Sensitivity:
    """The table of losses: as --table has it, or QLLM's folder; else measured, and kept there."""
    from qllm.plan.cached import load_or_measure
    from qllm.plan.measure import Job

    decided = args.lm_head, args.embedding
    job = Job(folder.path, candidates, samples, judged, *decided, seed=args.seed, device=device)
    path = Path(args.table) if args.table else None
    return load_or_measure(job, path, cli.meter("measuring the losses"), cli.note, cli.note_above)


def read_limits(args: argparse.Namespace, planner: Planner) -> Limits:
    """What the plan has to keep to."""
    from qllm.plan.planner import Limits

    objective = args.objective
    if objective is None:
        alone = args.max_kl is not None and not (args.avg_bits or planner.cluster)
        objective = "bytes" if alone else "loss"
    max_kl = args.max_kl
    if objective in ("latency", "throughput") and max_kl is None and args.avg_bits is None:
        name, usual = planner.usual_divergence(objective)
        bits, comma, embedding = name.partition(",")
        max_kl = usual * (1 + 1e-9)  # which it keeps to itself
        cli.note(
            f"--max-kl is not given: the plan is to be as good as uniform {bits} "
            f"bits{comma}{embedding}, {max_kl:.3g} nats"
        )
    return Limits(objective, max_kl, args.avg_bits, args.time_limit or TIME_LIMIT)


def show_plan(
    args: argparse.Namespace, folder: ModelFolder, planner: Planner, limits: Limits
) -> Plan:
    """Print and write the plan."""
    from qllm.checkpoint.writer import write_json
    from qllm.plan.tables import plan_lines

    plan = planner.decide(limits)
    if not args.json:
        cli.print_lines(plan_lines(folder.name, plan))
    if args.output:
        write_json(Path(args.output), plan.to_json())
    return plan


def show_front(
    args: argparse.Namespace, folder: ModelFolder, planner: Planner, limits: Limits
) -> list[dict[str, object]]:
    """Print and draw plans from the fewest bits to the most, uniform ones beside them."""
    from qllm.checkpoint.writer import write_json
    from qllm.plan.tables import front_lines

    plans = planner.front(limits, FRONT_POINTS)
    if not plans:
        raise planner.why_not(limits)
    names = [planner.uniform_name(i) for i in range(len(planner.sensitivity.candidates))]
    uniform = [(name, planner.uniform(i, limits)) for i, name in enumerate(names)]
    rows = [("planned", plan) for plan in plans] + [(f"uniform {n}", p) for n, p in uniform]
    if args.plot:
        from qllm.plan.plot import draw

        draw(Path(args.plot), folder.name, plans, uniform)
    found = [{"name": name} | plan.predicted() for name, plan in rows]
    if not args.json:
        cli.print_lines(front_lines(rows))
    if args.output:
        write_json(Path(args.output), {"front": [plan.to_json() for plan in plans]})
    return found


def check(
    args: argparse.Namespace,
    folder: ModelFolder,
    plan: Plan,
    samples: list[list[int]],
    judged: list[list[int]],
    device: str,
) -> Verified:
    """Quantize and run a plan here; print what was predicted beside what was measured."""
    from qllm import report
    from qllm.plan.verify import verify

    if plan.planner.cluster is not None and not plan.is_here():
        cli.note("the plan's devices are not this machine's CPU or GPU: no times are measured")
    dtype = cli.resolve_dtype(args)
    found = verify(folder.path, plan, args.algorithm, samples, judged, dtype, device)
    predicted = plan.predicted()
    if not args.json:
        columns = ["", "predicted", "probed beside the run", "measured"]
        tables = (predicted, found.probed, found.measured)
        rows = [
            [key, *(f"{table[key]:.4g}" if key in table else "" for table in tables)]
            for key in found.measured
        ]
        cli.print_lines(report.table_lines(columns, rows))
    return found


if __name__ == "__main__":
    cli.run(main)
