"""What each algorithm costs in quality: perplexity, and divergence from the 16-bit model.

    python3 -m benchmarks.quantization --text wiki.test.raw --calibration-text wiki.valid.raw

Quantizes the bundled models as qllm_quant.py does, and evaluates what was saved in float32. Prints
a Markdown table (perplexity, divergence in thousandths of a nat, seconds) and, last, one JSON line.

    python3 -m benchmarks.quantization --methods signround "gptq, refined" auto-round ...

Beside them auto-round, with as many steps on the same samples, in a column that is left out where
it is not installed (`pip install auto-round`; 0.16.1 was tried).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from qllm import cli, hub
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan, QuantSpec
from qllm.data import load_text, sample_windows
from qllm.errors import first_line
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.evaluate.perplexity import PerplexityOptions, Text, perplexity
from qllm.quant.algorithm import DistillOptions, QuantizeOptions, TuneOptions
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.tokenizer import Tokenizer

# A column of the table each: the algorithm, and its options.
METHODS = {
    "rtn": ("rtn", QuantizeOptions(clip=False)),
    "rtn, clip": ("rtn", QuantizeOptions(clip=True)),
    "awq": ("awq", QuantizeOptions()),
    "gptq": ("gptq", QuantizeOptions()),
    "signround": ("signround", QuantizeOptions()),
    "gptq, refined": ("gptq", QuantizeOptions(refine=True)),
}
AUTO_ROUND = "auto-round"
DENSE = QuantPlan.uniform(QuantSpec())


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    known = [*METHODS, AUTO_ROUND]
    parser.add_argument("--text", required=True, metavar="FILE", help="what is predicted")
    parser.add_argument("--calibration-text", required=True, metavar="FILE")
    parser.add_argument("--models", nargs="+", default=hub.bundled(), choices=hub.bundled())
    parser.add_argument("--bitwidths", nargs="+", default=["8", "4", "3", "2"], metavar="BITS")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[-1, 128, 32], metavar="N")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=known)
    parser.add_argument("--window", type=number, default=512, help="tokens (%(default)s)")
    parser.add_argument("--windows", type=number, default=20, help="at the most (%(default)s)")
    parser.add_argument("--nsamples", type=number, default=64, help="(%(default)s)")
    parser.add_argument("--seqlen", type=number, default=512, help="(%(default)s)")
    parser.add_argument("--refine-steps", type=number, default=200, help="(%(default)s)")
    args = parser.parse_args()
    if AUTO_ROUND in args.methods and importlib.util.find_spec("auto_round") is None:
        print("auto-round is not installed, and left out", file=sys.stderr)
        args.methods.remove(AUTO_ROUND)
    return args


def measure(family: str, args: argparse.Namespace) -> list[dict]:
    """A row per bitwidth and group size of one bundled model, the 16-bit one first."""
    folder = hub.resolve(family, hub.TINY).path
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(load_text(args.text, "evaluation"))[: args.window * args.windows]
    seen = tokenizer.encode(load_text(args.calibration_text))
    samples = sample_windows(seen, args.nsamples, min(args.seqlen, len(seen)), seed=0)
    dense = load_model(folder, DENSE, dtype=torch.float32)
    text, options = Text("", ids), PerplexityOptions(window=args.window)
    starts = range(0, len(ids) - args.window + 1, args.window)
    sequences = [ids[start : start + args.window] for start in starts]
    reference = ReferenceOutputs.of(DecoderReference(dense), sequences)
    found = perplexity(dense, text, options)["gptq"]
    rows = [{"model": folder.name, "bits": "16", "perplexity": found}]
    for bits in args.bitwidths:
        for group_size in args.group_sizes:
            row = {"model": folder.name, "bits": bits, "group_size": group_size, "methods": {}}
            for method in args.methods:
                with tempfile.TemporaryDirectory() as tmp_dir:
                    start = time.perf_counter()
                    form = bits, group_size, args.refine_steps
                    try:
                        out = quantized(method, folder, *form, samples, Path(tmp_dir) / "out")
                    except Exception as error:
                        if method != AUTO_ROUND:
                            raise
                        # It does not take every family; what the others found is not lost by that.
                        row["methods"][method] = {"failed": first_line(error)}
                        continue
                    seconds = time.perf_counter() - start
                    model = load_model(out, DENSE, dtype=torch.float32)
                    row["methods"][method] = {
                        "perplexity": perplexity(model, text, options)["gptq"],
                        "divergence": agreement(model, reference)["kl"]["mean"],
                        "seconds": seconds,
                    }
                print(".", end="", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def quantized(
    method: str,
    folder: Path,
    bits: str,
    group_size: int,
    steps: int,
    samples: list[list[int]],
    target: Path,
) -> Path:
    """The folder of what a method makes of a model."""
    if method == AUTO_ROUND:
        return auto_round(folder, int(bits), group_size, steps, samples, target)
    algorithm, how = METHODS[method]
    how = replace(how, tune=TuneOptions(steps), distill=DistillOptions(-(-steps // 2)))
    plan = QuantPlan.uniform(QuantSpec.parse(bits, group_size, algorithm=algorithm))
    calibration = None if algorithm == "rtn" else samples
    quantize_checkpoint(Job(folder, plan, how, calibration, dtype=torch.float32), target)
    return target


def auto_round(
    folder: Path,
    bits: int,
    group_size: int,
    steps: int,
    samples: list[list[int]],
    target: Path,
) -> Path:
    """What auto-round makes of it: the dequantized values, in 16 bits."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tune = TuneOptions(steps)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    form = {"bits": bits, "group_size": group_size, "sym": False, "data_type": "int"}
    AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        scheme=form,
        iters=steps,
        nsamples=len(samples),
        seqlen=len(samples[0]),
        batch_size=tune.samples(len(samples[0]), model.config.hidden_size),
        dataset=[torch.tensor([sample]) for sample in samples],
        device_map="cpu",
        seed=tune.seed,
    ).quantize_and_save(str(target), format="fake")
    return next(target.rglob("config.json")).parent  # whose name it makes up


def _cell(found: dict) -> str:
    if "failed" in found:
        return f"failed: {found['failed']}"
    return f"{found['perplexity']:.2f}, {1000 * found['divergence']:.3g}, {found['seconds']:.0f} s"


def main() -> None:
    args = parse_args()
    rows = [row for family in args.models for row in measure(family, args)]
    print(file=sys.stderr)
    print("| model | bits | group |", " | ".join(args.methods), "|")
    print("|---|---|---|" + "---|" * len(args.methods))
    for row in rows:
        if "methods" not in row:
            cells = [row["bits"], "", f"{row['perplexity']:.2f}"] + [""] * (len(args.methods) - 1)
        else:
            group = "channel" if row["group_size"] == -1 else str(row["group_size"])
            found = row["methods"].values()
            cells = [row["bits"], group]
            cells += map(_cell, found)
        print(f"| {row['model']} | {' | '.join(cells)} |")
    print(json.dumps({"settings": vars(args), "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
