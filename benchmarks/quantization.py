"""What each algorithm costs in quality: perplexity, and divergence from the 16-bit model.

    python3 -m benchmarks.quantization --text wiki.test.raw --calibration-text wiki.valid.raw

Quantizes the bundled models as qllm_quant.py does, and evaluates what was saved in float32. Prints
a Markdown table (divergences in thousandths of a nat) and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from qllm import cli, hub
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan, QuantSpec
from qllm.data import load_text, sample_windows
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.evaluate.perplexity import PerplexityOptions, Text, perplexity
from qllm.quant.algorithm import QuantizeOptions
from qllm.quantizer.checkpoint import Job, quantize_checkpoint
from qllm.tokenizer import Tokenizer

# A column of the table each: the algorithm, and whether the clipping range is searched.
METHODS = {
    "rtn": ("rtn", False),
    "rtn, clip": ("rtn", True),
    "awq": ("awq", None),
    "gptq": ("gptq", None),
}
DENSE = QuantPlan.uniform(QuantSpec())


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--text", required=True, metavar="FILE", help="what is predicted")
    parser.add_argument("--calibration-text", required=True, metavar="FILE")
    parser.add_argument("--models", nargs="+", default=hub.bundled(), metavar="NAME")
    parser.add_argument("--bitwidths", nargs="+", default=["8", "4", "3", "2"], metavar="BITS")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[-1, 128, 32], metavar="N")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--window", type=number, default=512, help="tokens (%(default)s)")
    parser.add_argument("--windows", type=number, default=20, help="at the most (%(default)s)")
    parser.add_argument("--nsamples", type=number, default=64, help="(%(default)s)")
    parser.add_argument("--seqlen", type=number, default=512, help="(%(default)s)")
    return parser.parse_args()


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
    passages = [ids[start : start + args.window] for start in starts]
    reference = ReferenceOutputs.of(DecoderReference(dense), passages)
    found = perplexity(dense, text, options)["gptq"]
    rows = [{"model": folder.name, "bits": "16", "perplexity": found}]
    for bits in args.bitwidths:
        for group_size in args.group_sizes:
            row = {"model": folder.name, "bits": bits, "group_size": group_size, "methods": {}}
            for method in args.methods:
                algorithm, clip = METHODS[method]
                spec = QuantSpec.parse(bits, group_size, algorithm=algorithm)
                job = Job(
                    folder,
                    QuantPlan.uniform(spec),
                    QuantizeOptions(clip=clip),
                    samples=None if algorithm == "rtn" else samples,
                    dtype=torch.float32,
                )
                with tempfile.TemporaryDirectory() as place:
                    quantize_checkpoint(job, Path(place) / "out")
                    model = load_model(Path(place) / "out", DENSE, dtype=torch.float32)
                    row["methods"][method] = {
                        "perplexity": perplexity(model, text, options)["gptq"],
                        "divergence": agreement(model, reference)["kl"]["mean"],
                    }
                print(".", end="", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


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
            cells += [f"{m['perplexity']:.2f}, {1000 * m['divergence']:.3g}" for m in found]
        print(f"| {row['model']} | {' | '.join(cells)} |")
    print(json.dumps({"settings": vars(args), "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
