"""What planned bits gain over uniform ones at the same bytes, measured on the bundled models.

    python3 -m benchmarks.planned --text wiki.test.raw --calibration-text wiki.valid.raw
    python3 -m benchmarks.planned --models llama --bits 2,3,4,5,6,8 --group-size 64 --autoscheme

Plans for the bytes of uniform bits and for the middle between two of them; each is quantized with
GPTQ and its divergence from the 16-bit model measured on the text. With --autoscheme the bits that
AutoRound's AutoScheme picks (auto-round has to be installed) are quantized in the same way, at the
same bytes. Prints a Markdown table (divergences in thousandths of a nat) and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qllm import cli
from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.config import QuantSpec
from qllm.data import load_text, sample_windows
from qllm.errors import UserError
from qllm.plan.candidates import labels, parse_candidates
from qllm.plan.measure import Job, measure
from qllm.plan.planner import Limits, Plan, Planner
from qllm.plan.shape import Shape, Workload
from qllm.plan.verify import verify
from qllm.pretrained import Pretrained

MODELS = ("opt", "bloom", "llama")
Windows = list[list[int]]


@dataclass(frozen=True)
class Given:
    """A model, and the windows that are calibrated, planned and judged on."""

    folder: Path
    planner: Planner
    samples: Windows
    judged: Windows

    def divergence(self, plan: Plan) -> float:
        """Of the plan's model, quantized with GPTQ, from the 16-bit one."""
        device = "cpu"
        found = verify(self.folder, plan, "gptq", self.samples, self.judged, None, device)
        return found.measured["divergence"]


def prepare(name: str, args: argparse.Namespace) -> Given:
    """Measure a model's losses."""
    pretrained = Pretrained.open(f"{name}-tiny")
    folder = pretrained.folder.path
    ids = pretrained.encode(load_text(args.calibration_text))
    few = max(1, args.nsamples // 4)
    windows = sample_windows(ids, args.nsamples + few, args.seqlen, seed=0)
    samples, planned_on = windows[: args.nsamples], windows[args.nsamples :]
    candidates = parse_candidates(args.bits, args.group_size, "asym", QuantSpec(algorithm="gptq"))
    table = measure(Job(folder, candidates, samples, planned_on, embedding=args.embedding))
    given = (folder, table.modules, candidates, None)
    shape = Shape.of(*given, float32_scales=table.float32_scales)
    planner = Planner(table, shape, Workload())
    ids = pretrained.encode(load_text(args.text))
    judged = sample_windows(ids, max(1, args.nsamples // 4), args.seqlen, seed=1)
    return Given(folder, planner, samples, judged)


def rows_of(name: str, given: Given, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Plans beside uniform bits, which a candidate with the largest groups stands for."""
    planner = given.planner
    candidates = planner.sensitivity.candidates
    uniform: dict[int, tuple[float, float]] = {}
    for bits in args.uniform:
        index = next((i for i, spec in enumerate(candidates) if spec.bits == bits), None)
        if index is None:
            raise UserError(f"--uniform {bits} is not among --bits {args.bits}")
        plan = planner.uniform(index, Limits())
        size = plan.solution.costs.bits
        uniform[bits] = size, given.divergence(plan)
        yield row(name, f"{bits} bits", given, size, uniform[bits][1])
    for low, high in zip(args.uniform, args.uniform[1:], strict=False):
        (less, worse), (more, better) = uniform[low], uniform[high]
        line = (worse + better) / 2
        yield row(name, f"between {low} and {high} bits", given, (less + more) / 2, line)


def row(
    name: str, at: str, given: Given, bits: float, other: float, kind: str = "uniform"
) -> dict[str, object]:
    """A plan of so many bits per weight beside another way to spend them."""
    plan = given.planner.decide(Limits(max_bits=bits + 1e-9))
    measured = given.divergence(plan)
    found = {"model": name, "at": at, "bits_per_weight": bits, "beside": kind, "other": other}
    found |= {"planned": measured, "predicted": plan.divergence, "ratio": measured / other}
    cells = [f"{1e3 * other:.3f}", f"{1e3 * measured:.3f}", f"{1e3 * plan.divergence:.3f}"]
    print(f"| {name} | {at} | {bits:.2f} | {kind} | {' | '.join(cells)} | {measured / other:.2f} |")
    return found


def autoscheme(name: str, given: Given, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The same with AutoScheme's bits, which are given the same candidates, text and samples."""
    try:
        from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
        from auto_round.schemes import QuantizationScheme
    except ImportError:
        raise UserError("--autoscheme takes auto-round; pip install auto-round") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    planner = given.planner
    candidates = planner.sensitivity.candidates
    if len({spec.group_size for spec in candidates}) > 1:
        raise UserError("--autoscheme compares one --group-size")
    options = [
        QuantizationScheme(
            bits=s.bits, group_size=s.group_size, sym=False, data_type="int", act_bits=16
        )
        for s in candidates
    ]
    names = Weights(Checkpoint(given.folder)).names
    parts = {
        module: [part.removesuffix(".weight") for part in names.sources(f"{module}.weight")]
        for module in planner.sensitivity.modules
    }
    fused = {tuple(p.rpartition(".")[2] for p in each) for each in parts.values() if len(each) > 1}
    targets = [(a + b) / 2 for a, b in zip(args.uniform, args.uniform[1:], strict=False)]
    targets += args.uniform[1:-1]
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    with tempfile.TemporaryDirectory() as tmp_dir:
        text = load_text(args.calibration_text)
        size = len(text) // (3 * args.nsamples)
        lines = [text[i * size : (i + 1) * size] for i in range(3 * args.nsamples)]
        file = Path(tmp_dir) / "calibration.jsonl"
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        scheme = AutoScheme(
            avg_bits=[float(each) for each in sorted(targets)],
            options=options,
            ignore_scale_zp_bits=True,
            shared_layers=[list(each) for each in sorted(fused)] or None,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            dataset=str(file),
            low_gpu_mem_usage=False,
            low_cpu_mem_usage=False,
            enable_torch_compile=False,
        )
        layers = [part for each in parts.values() for part in each]
        how = {"device_map": "cpu", "tokenizer": tokenizer, "enable_torch_compile": False}
        found = GenScheme(scheme, model, layers, {}, str(file), **how).get_layer_config()
    called = labels(candidates)
    for target, config in found.items():
        choice = [called.index(str(config[each[0]]["bits"])) for each in parts.values()]
        plan = chosen(planner, choice)
        theirs = given.divergence(plan)
        at = f"AutoScheme's {target:g} bits"
        yield row(name, at, given, plan.solution.costs.bits, theirs, "AutoScheme")


def chosen(planner: Planner, choice: Sequence[int]) -> Plan:
    """A plan that somebody else made."""
    base = planner.uniform(0, Limits())
    device = np.zeros(len(planner.shape.fixed), dtype=np.int64)
    costs = base.problem.evaluate(np.array(choice), device)
    return replace(base, solution=replace(base.solution, choice=np.array(choice), costs=costs))


def main() -> None:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--text", default="wikitext2", metavar="FILE_OR_NAME")
    parser.add_argument("--calibration-text", default="wikitext2", metavar="FILE_OR_NAME")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bits", default="1,2,3,4,5,8", metavar="BITS")
    parser.add_argument("--group-size", default="-1,64", metavar="N")
    parser.add_argument("--uniform", nargs="+", type=number, default=[2, 3, 4], metavar="BITS")
    parser.add_argument("--nsamples", type=number, default=128, metavar="N")
    parser.add_argument("--seqlen", type=number, default=256, metavar="N")
    parser.add_argument(
        "--embedding",
        action="store_true",
        help="decide on embeddings, too, which uniform bits leave at the most of --bits",
    )
    parser.add_argument("--autoscheme", action="store_true", help="AutoRound's bits beside ours")
    args = parser.parse_args()
    args.uniform.sort()
    columns = ["model", "at the bytes of", "bits per weight", "beside"]
    columns += ["its divergence", "planned", "predicted", "ratio"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    found = []
    for name in args.models:
        given = prepare(name, args)
        found += rows_of(name, given, args)
        if args.autoscheme:
            found += autoscheme(name, given, args)
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main)
