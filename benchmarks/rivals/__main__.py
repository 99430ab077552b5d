"""Times of QLLM's and other runtimes' layers and models, with random weights.

    python3 -m benchmarks.rivals --layer 4096x4096 11008x4096
    python3 -m benchmarks.rivals --model tinyllama-1.1b
    python3 -m benchmarks.rivals --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python3 -m benchmarks.rivals --model tinyllama-1.1b --layers 4 --bits 4 --kv-bits 8 \
        --batches 8 --context 4096

A layer is N x K, N its output channels, in as many copies as fill --megabytes, so that no cache
holds them; the times are medians. Models are all in memory, each rival's in a process of its own,
and take turns in --rounds, since a machine may be faster or slower a minute later; their figures
are medians over the rounds. GB/s is what a product with one row reads over its time, or a decoding
step over its own, beside the rate at which torch sums a large array. Rivals that are not installed
are left out: `benchmarks/rivals/__init__.py` says how to install them. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rivals import GGUF_RIVALS, KV_RIVALS, LAYER_RIVALS, MODEL_RIVALS, RIVALS, Rival
from benchmarks.rivals.interleaved import Settings, measure_models
from qllm import cli

if TYPE_CHECKING:
    from benchmarks.rivals.common import LayerBench

# Bits and group of the layers that are asked of every rival.
CASES = (("16", -1), ("8:tc-li", -1), ("8", -1), ("8", 128), ("4", 128), ("4", 32), ("3", 128))
REPOSITORIES = {
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "bloom-560m": "bigscience/bloom-560m",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--layer", nargs="+", type=shape, metavar="NxK")
    what.add_argument("--model", choices=list(REPOSITORIES))
    what.add_argument("--gguf", metavar="FILE", help="a model that QLLM and llama.cpp both read")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    number = cli.whole_number(1)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=number, default=cores, help="of each (%(default)s)")
    parser.add_argument("--rows", nargs="+", type=number, default=[1, 4, 32, 128], metavar="M")
    parser.add_argument(
        "--megabytes", type=number, default=256, help="of a layer's copies (%(default)s)"
    )
    parser.add_argument("--repeats", type=number, default=30, help="of a layer (%(default)s)")
    parser.add_argument("--prompt", type=number, default=512, help="to prefill (%(default)s)")
    parser.add_argument("--batches", nargs="+", type=number, default=[1, 8], metavar="B")
    parser.add_argument("--context", type=number, default=128, help="of a batch (%(default)s)")
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=(16, 8, 4),
        default=16,
        help="of the KV cache, of rivals that have such a one (%(default)s)",
    )
    parser.add_argument("--layers", type=number, metavar="N", help="of a model (all)")
    parser.add_argument("--bits", nargs="+", help="of the models' weights (all)")
    parser.add_argument("--steps", type=number, default=32, help="to decode (%(default)s)")
    parser.add_argument("--rounds", type=number, default=3, help="of all models (%(default)s)")
    return parser.parse_args()


def shape(text: str) -> tuple[int, int]:
    """An argparse type: 4096x11008 -> (4096, 11008)."""
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not two whole numbers, as 4096x11008 is")
    return int(n), int(k)


def installed(known: dict[str, Rival], wanted: list[str]) -> Iterator[tuple[str, Rival]]:
    """Those wanted of the known rivals; a note for each that lacks a package."""
    for name, rival in known.items():
        missing = rival.missing()
        if name not in wanted:
            continue
        if missing:
            cli.note(f"{name} is left out: {', '.join(missing)} not installed")
        else:
            yield name, rival


def layer_row(bench: LayerBench, args: argparse.Namespace) -> dict[str, object]:
    """Times of one layer."""
    from qllm.ops.cpu.limits import median_seconds, read_bandwidth

    before = read_bandwidth()
    seconds = {m: median_seconds(lambda m=m: bench.run(m), args.repeats) for m in args.rows}
    return {
        "bandwidth": (before + read_bandwidth()) / 2,
        "name": bench.name,
        "bits": bench.bits,
        "bytes": bench.size,
        "error": bench.error,
        "seconds": seconds,
    }


def measure_layers(n: int, k: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row per rival, bitwidth, group and setting."""
    rows = []
    for rival, entry in installed(LAYER_RIVALS, args.rivals):
        module = entry.load()
        for bits, group in CASES:
            if k % group:
                continue
            each = n * k * int(bits.partition(":")[0]) // 8
            copies = max(2, -(-args.megabytes * 10**6 // each))
            for bench in module.layers(n, k, bits, group, copies, args.threads):
                rows.append({"layer": [n, k], "rival": rival} | layer_row(bench, args))
    return rows


def print_layers(rows: list[dict], args: argparse.Namespace) -> None:
    """Milliseconds."""
    header = [f"{m} row{'s' * (m > 1)}, ms" for m in args.rows]
    print("| layer | rival | bits | operation | error |", " | ".join(header), end="")
    print(f" | GB/s at {args.rows[0]} | TOP/s at {args.rows[-1]} |")
    print("|---|---|---|---|---|" + "---|" * (len(header) + 2))
    for row in rows:
        times = " | ".join(f"{1000 * seconds:.3f}" for seconds in row["seconds"].values())
        rate = row["bytes"] / row["seconds"][args.rows[0]] / 1e9
        size = "x".join(map(str, row["layer"]))
        print(f"| {size} | {row['rival']} | {row['bits']} | {row['name']} ", end="")
        n, k = row["layer"]
        speed = 2 * n * k * args.rows[-1] / row["seconds"][args.rows[-1]] / 1e12
        print(f"| {row['error']:.4f} | {times} ", end="")
        print(f"| {rate:.1f} ({rate * 1e9 / row['bandwidth']:.0%}) | {speed:.2f} |")


def print_models(rows: list[dict], args: argparse.Namespace) -> None:
    """Tokens per second of a prompt, milliseconds of a step."""
    header = [f"decode of {batch}, ms" for batch in args.batches]
    print(f"| model | bits | MB | prefill of {args.prompt}, tokens/s |", " | ".join(header), end="")
    print(f" | GB/s of {args.batches[0]} |")
    print("|---|---|---|---|" + "---|" * (len(header) + 1))
    for row in rows:
        times = " | ".join(f"{1000 * seconds:.1f}" for seconds in row["decode"].values())
        rate = row["bytes"] / row["decode"][args.batches[0]] / 1e9
        print(f"| {row['name']} | {row['bits']} | {row['bytes'] / 1e6:.0f} ", end="")
        print(f"| {args.prompt / row['prefill']:.0f} | {times} | {rate:.1f} ({row['share']:.0%}) |")


def main() -> None:
    args = parse_args()

    import torch

    from qllm.ops.cpu import library
    from qllm.ops.cpu.limits import int8_rate

    torch.set_num_threads(args.threads)
    rate = int8_rate()
    if args.layer:
        rows = [row for n, k in args.layer for row in measure_layers(n, k, args)]
    else:
        rivals = [name for name, _ in installed(MODEL_RIVALS, args.rivals)]
        settings = Settings(
            args.threads,
            args.prompt,
            args.batches,
            args.context,
            args.steps,
            args.kv_bits,
            args.layers,
            args.bits,
        )
        model = args.gguf or REPOSITORIES[args.model]
        if args.gguf:
            rivals = [name for name in rivals if name in GGUF_RIVALS]
        if args.kv_bits < 16:
            rivals = [name for name in rivals if name in KV_RIVALS]
        rows = measure_models(model, rivals, settings, args.rounds)
    versions = {name: RIVALS[name].version() for name in {row["rival"]: 0 for row in rows}}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    bandwidth = statistics.median(row["bandwidth"] for row in rows)
    print(
        f"{args.threads} threads, {library.about()}: memory read at {bandwidth / 1e9:.1f} GB/s, ",
        end="",
    )
    print(f"int8 products at {rate / 1e12:.2f} TOP/s\n")
    if args.layer:
        print_layers(rows, args)
    else:
        print(f"{args.model or Path(args.gguf).stem}\n")
        print_models(rows, args)
    limits = {"bandwidth": bandwidth, "int8_rate": rate}
    print(json.dumps({"settings": vars(args), "versions": versions, **limits, "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
