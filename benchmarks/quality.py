"""What each bitwidth costs: bytes, agreement with the reference, perplexity of a text.

    python3 -m benchmarks.quality --text wiki.test.raw

Prints a Markdown table and, last, one JSON line. The reference is transformers in the same type:
its greedy tokens for prompts cut from the text, and its perplexity.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from qllm import cli, hub
from qllm.calibration import calibrate
from qllm.checkpoint.load import load_model, module_bytes
from qllm.config import BITWIDTHS, QuantPlan, QuantSpec
from qllm.data import load_text, sample_windows
from qllm.evaluate.perplexity import PerplexityOptions, Text, perplexity
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.huggingface import HuggingFaceModel
from qllm.report import first_difference
from qllm.tokenizer import Tokenizer


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--text", required=True, metavar="FILE", help="what is predicted")
    parser.add_argument("--calibration-text", metavar="FILE", help="for 8:tc-li, 8:tc (--text)")
    parser.add_argument("--models", nargs="+", default=hub.bundled(), choices=hub.bundled())
    parser.add_argument("--bitwidths", nargs="+", default=list(BITWIDTHS[::-1]), metavar="BITS")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"))
    number = cli.whole_number(1)
    parser.add_argument("--window", type=number, default=512, help="tokens (%(default)s)")
    parser.add_argument("--windows", type=number, default=20, help="at the most (%(default)s)")
    parser.add_argument("--prompts", type=number, default=64, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=number, default=32, help="each (%(default)s)")
    return parser.parse_args()


def measure(family: str, args: argparse.Namespace) -> list[dict]:
    """A row per bitwidth of one bundled model, the reference first."""
    folder = hub.resolve(family, hub.TINY).path
    dtype = getattr(torch, args.dtype)
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(load_text(args.text, "evaluation"))[: args.window * args.windows]
    prompts = sample_windows(ids, args.prompts, 20, seed=1)
    seen = tokenizer.encode(load_text(args.calibration_text or args.text))
    samples = sample_windows(seen, 32, min(256, len(seen)), seed=0)

    dense = load_model(folder, QuantPlan.uniform(QuantSpec()), dtype=dtype)
    reference = HuggingFaceModel.load(folder, dtype=dtype)
    expected = reference.greedy(prompts, args.new_tokens)
    text, options = Text("", ids), PerplexityOptions(window=args.window)
    rows = [
        {
            "model": folder.name,
            "bitwidth": "transformers",
            "bytes": reference.nbytes,
            "perplexity": perplexity(reference, text, options)["gptq"],
        }
    ]
    calibration = calibrate(dense, samples)
    count = args.new_tokens
    generation = GenerationConfig(count)
    for bitwidth in args.bitwidths:
        plan = QuantPlan.parse(bitwidth)
        model = load_model(folder, plan, dtype=dtype, calibration=calibration)
        tokens = generate(model, prompts, generation)
        pairs = list(zip(tokens, expected, strict=True))
        firsts = [first_difference(*pair) for pair in pairs]
        rows.append(
            {
                "model": folder.name,
                "bitwidth": bitwidth,
                "bytes": module_bytes(model),
                "first_token": sum(a[0] == b[0] for a, b in pairs) / len(pairs),
                "common_prefix": sum(count if f is None else f for f in firsts) / len(firsts),
                "perplexity": perplexity(model, text, options)["gptq"],
            }
        )
        print(".", end="", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    args = parse_args()
    rows = [row for family in args.models for row in measure(family, args)]
    print(file=sys.stderr)
    print("| model | bitwidth | MB | same first token | same tokens, of", args.new_tokens, end="")
    print(" | perplexity |\n|---|---|---|---|---|---|")
    for row in rows:
        first = f"{row['first_token']:.0%}" if "first_token" in row else ""
        prefix = f"{row['common_prefix']:.1f}" if "common_prefix" in row else ""
        print(
            f"| {row['model']} | {row['bitwidth']} | {row['bytes'] / 1e6:.2f} "
            f"| {first} | {prefix} | {row['perplexity']:.2f} |"
        )
    print(json.dumps({"settings": vars(args), "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
