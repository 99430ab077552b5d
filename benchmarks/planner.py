"""What the planner predicts for large models on unlike devices, beside uniform bits.

    python3 -m benchmarks.planner
    python3 -m benchmarks.planner --text wiki.valid.raw --model opt-30b --time-limit 60

All of it is prediction: devices are described by their published figures, and no such model is
here. The losses are those of the bundled OPT, measured, and stretched over the layers. For each
cluster and each of some uniform bits that fit: tokens per second with as many layers on each,
with the layers where they are fastest, and of a plan that loses no more. Prints a Markdown table
and, last, one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from qllm import cli, hub
from qllm.config import QuantSpec
from qllm.data import load_text, sample_windows
from qllm.errors import UserError
from qllm.models import Decoder, RawConfig, read_config
from qllm.plan.candidates import labels, parse_candidates
from qllm.plan.devices import Cluster, DescribedSpeed, Device
from qllm.plan.measure import Job, measure
from qllm.plan.planner import Limits, Plan, Planner
from qllm.plan.sensitivity import Sensitivity
from qllm.plan.shape import Shape, Workload
from qllm.tokenizer import Tokenizer
from tools.random_checkpoint import opt_config

MODELS = {"opt-13b": (5120, 40, 40), "opt-30b": (7168, 48, 56), "opt-66b": (9216, 64, 72)}
# Memory, bytes a second, operations a second in float16 and int8: as they are published.
DEVICES = {
    "P100": (12e9, 549e9, 18.7e12, 18.7e12),
    "T4": (16e9, 320e9, 65e12, 130e12),
    "V100": (32e9, 900e9, 112e12, 112e12),
    "A100": (40e9, 1555e9, 312e12, 624e12),
}
# What is kept free on each for the runtime.
RUNTIME = 1.5e9
# Model, devices in the order of the even stages, and the network's bits a second.
CASES = (
    ("opt-30b", ("P100",) * 3 + ("V100",), 100e9),
    ("opt-30b", ("T4",) * 3 + ("V100",), 100e9),
    ("opt-66b", ("V100",) * 3 + ("A100",), 800e9),
    ("opt-66b", ("T4",) * 4 + ("V100",) * 2, 800e9),
)
WORK = Workload(prompt=512, new=100, batch=32)  # LLM-PQ's
BITS = "3,4,5,6,8,16"
QUALITIES = ("4", "8")


def device(name: str, number: int) -> Device:
    memory, bandwidth, flops, int8 = DEVICES[name]
    speed = DescribedSpeed(bandwidth, flops, int8)
    return Device(f"{name}.{number}", memory - RUNTIME, speed, name)


def stretched(small: Sensitivity, names: list[str], layers: int) -> Sensitivity:
    """The losses of a shallow model's linears over a deep one's, by relative depth.

    The divergence of all linears together stays: that of each is shared by those it stands for.
    """
    inner = [name.split(".", 2)[2] for name in small.modules]
    few = 1 + max(int(name.split(".")[1]) for name in small.modules)
    rows = []
    for name in names:
        _, index, kind = name.split(".", 2)
        depth = round(int(index) * (few - 1) / (layers - 1))
        rows.append(next(i for i, k in enumerate(inner) if k == kind and depth == _depth(small, i)))
    share = few / layers
    return Sensitivity(
        tuple(names),
        small.candidates,
        small.errors[rows],
        small.float32_scales[rows],
        small.probe,
        small.alone[rows] * share,
        small.choices[:, rows],
        small.divergences,
        small.about,
    )


def _depth(small: Sensitivity, index: int) -> int:
    return int(small.modules[index].split(".")[1])


def even(planner: Planner, candidate: int, limits: Limits) -> Plan | None:
    """Uniform bits with as many layers on each device; None where they do not fit."""
    assert planner.cluster is not None
    memory = np.array([each.memory for each in planner.cluster.devices])
    plan = planner.uniform(candidate, limits)
    return plan if (plan.solution.costs.held <= memory).all() else None


def balanced(planner: Planner, candidate: int, limits: Limits) -> Plan | None:
    """Uniform bits with the layers where they are fastest; None where they do not fit."""
    mask = np.zeros(planner.sensitivity.errors.shape, dtype=bool)
    mask[:, candidate] = True
    try:
        return replace(planner, allowed=mask).decide(limits)
    except UserError:
        return None


def rows_of(
    small: Sensitivity, name: str, devices: tuple[str, ...], network: float, limit: float
) -> Iterator[dict[str, object]]:
    """For each of QUALITIES that fits, tokens per second of the three plans of one cluster."""
    raw = RawConfig(opt_config(*MODELS[name]), name)
    model = Decoder(read_config(raw), {}, torch.float16)
    names = [n for n, m in model.named_modules() if _is_decided(n, small)]
    table = stretched(small, names, model.config.num_layers)
    shape = Shape.of_model(model, names, table.candidates)
    counted = tuple(device(kind, devices[:i].count(kind)) for i, kind in enumerate(devices))
    planner = Planner(table, shape, WORK, Cluster(counted, network))
    limits = Limits("throughput", time_limit=limit)
    for candidate, bits in enumerate(labels(table.candidates)):
        if bits not in QUALITIES or (best := balanced(planner, candidate, limits)) is None:
            continue
        loss = best.divergence * (1 + 1e-9)
        planned = planner.decide(replace(limits, max_divergence=loss))
        plans = {"even": even(planner, candidate, limits), "balanced": best, "planned": planned}
        speeds = {
            kind: None if plan is None else WORK.batch * WORK.new / plan.solution.costs.slowest
            for kind, plan in plans.items()
        }
        yield {
            "model": name,
            "devices": " + ".join(f"{devices.count(k)} x {k}" for k in dict.fromkeys(devices)),
            "uniform": bits,
            **speeds,
            "bits": planned.solution.costs.bits,
            "stages": planned.stages,
            "order": [each.name for each in planned.order],
            "gap": planned.solution.gap,
            "seconds": planned.solution.seconds,
        }


def _is_decided(name: str, small: Sensitivity) -> bool:
    kinds = {each.split(".", 2)[2] for each in small.modules}
    return name.startswith("layers.") and name.split(".", 2)[-1] in kinds


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--text", default="wikitext2", metavar="FILE_OR_NAME")
    parser.add_argument("--model", choices=list(MODELS), help="its clusters alone")
    number = cli.whole_number(2)
    parser.add_argument("--windows", type=number, default=24, metavar="N", help="of 256 tokens")
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS")
    args = parser.parse_args()
    folder = hub.find("opt-tiny").path
    config = read_config(RawConfig(json.loads((folder / "config.json").read_text()), "opt-tiny"))
    ids = Tokenizer.load(folder, config.vocab_size).encode(load_text(args.text))
    windows = sample_windows(ids, args.windows, 256, seed=0)
    judged = max(1, args.windows // 3)
    candidates = parse_candidates(BITS, "-1", "asym", QuantSpec(algorithm="gptq"))
    small = measure(Job(folder, candidates, windows[judged:], windows[:judged]))
    print("| model | devices | as good as | even | balanced | planned | its bits |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for name, devices, network in CASES:
        if args.model not in (None, name):
            continue
        for row in rows_of(small, name, devices, network, args.time_limit):
            found.append(row)
            speeds = [row[kind] for kind in ("even", "balanced", "planned")]
            cells = [row["model"], row["devices"], f"{row['uniform']} bits"]
            cells += ["does not fit" if each is None else f"{each:.0f}" for each in speeds]
            print("|", " | ".join([*cells, f"{row['bits']:.2f}"]), "|", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
