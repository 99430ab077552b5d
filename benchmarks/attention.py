"""Attention of a decode step over a long context, by bits of the KV cache.

    python3 -m benchmarks.attention
    python3 -m benchmarks.attention --shapes llama-2-7b --context 16384 --batch 1 --kv-bits 16 4

Milliseconds of one layer's attention for --batch sequences that hold --context tokens each, in
bfloat16; all --kv-bits take turns in --rounds, of which the medians are shown. GB/s is what is read
of keys and values over that, beside the rate at which all threads read memory, measured between the
turns. A step that ends a run of 64 tokens, which is quantized then, takes longer: its time is there
as well. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from typing import TYPE_CHECKING

from qllm import cli

if TYPE_CHECKING:
    from qllm.ops.kv import KV
    from qllm.ops.quantized_kv import QuantizedKV

# Heads of queries, of keys and values, and their channels.
SHAPES = {"opt-1.3b": (32, 32, 64), "tinyllama-1.1b": (32, 4, 64), "llama-2-7b": (32, 32, 128)}


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    shapes = ["opt-1.3b", "tinyllama-1.1b"]
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=shapes)
    parser.add_argument("--kv-bits", nargs="+", type=int, choices=(16, 8, 4), default=[16, 8, 4])
    parser.add_argument(
        "--context", type=cli.whole_number(64), default=4096, help="tokens (%(default)s)"
    )
    parser.add_argument("--batch", type=number, default=8, help="sequences (%(default)s)")
    parser.add_argument("--rounds", type=number, default=9, help="of all (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=number, default=cores, help="(%(default)s)")
    return parser.parse_args()


def random_cache(shape: str, bits: int, batch: int, context: int) -> KV | QuantizedKV:
    """A cache with something in it: how long attention takes does not depend on what that is."""
    import torch

    from qllm.models.cache import KINDS

    _, kv_heads, dim = SHAPES[shape]
    kv = KINDS[bits].empty(bits, batch, kv_heads, context, dim, torch.bfloat16, "cpu")
    for part in kv:
        if part.dtype == torch.uint8:
            part.random_(0, 256)
        else:
            part.uniform_(0.01, 0.02)
    return kv


def measure(shape: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each number of bits."""
    import torch

    from qllm.ops.cpu import steps
    from qllm.ops.cpu.limits import read_bandwidth
    from qllm.ops.kv import Batch
    from qllm.ops.quantized_kv import RUN

    heads, kv_heads, dim = SHAPES[shape]
    caches = {bits: random_cache(shape, bits, args.batch, args.context) for bits in args.kv_bits}
    qkv = torch.randn(args.batch, (heads + 2 * kv_heads) * dim).bfloat16()
    whole = args.context // RUN * RUN
    positions = {"usual": whole - 2, "last of a run": whole - 1}
    batches = {
        name: Batch.of([1] * args.batch, "cpu", pasts=[position] * args.batch)
        for name, position in positions.items()
    }
    seconds: dict[tuple[int, str], list[float]] = {}
    rates = []
    for turn in range(args.rounds + 1):
        rates.append(read_bandwidth(1))
        for (bits, kv), (name, batch) in itertools.product(caches.items(), batches.items()):
            start = time.perf_counter()
            steps.decode_attention(qkv, kv, batch, None, None)
            if turn:
                seconds.setdefault((bits, name), []).append(time.perf_counter() - start)
    found = []
    for bits, kv in caches.items():
        size = args.batch * kv.row_bytes(bits, kv_heads, args.context, dim, torch.bfloat16)
        row = {"shape": shape, "kv_bits": bits, "bytes": size}
        times = {name: statistics.median(seconds[bits, name]) for name in batches}
        found.append(row | {"seconds": times["usual"], "last_of_run": times["last of a run"]})
    return [row | {"bandwidth": statistics.median(rates)} for row in found]


def main() -> None:
    args = parse_args()

    import torch

    from qllm.ops.cpu import library

    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, {library.about()}, {args.batch} x {args.context} tokens\n")
    print("| shape | KV bits | MB | ms | speed | GB/s | of memory's | ms of a run's last token |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for shape in args.shapes:
        found = measure(shape, args)
        for row in found:
            rate, speed = row["bytes"] / row["seconds"], found[0]["seconds"] / row["seconds"]
            print(f"| {shape} | {row['kv_bits']} | {row['bytes'] / 1e6:.0f} ", end="")
            print(f"| {1e3 * row['seconds']:.2f} | {speed:.2f} ", end="")
            print(f"| {rate / 1e9:.1f} | {rate / row['bandwidth']:.0%} ", end="")
            print(f"| {1e3 * row['last_of_run']:.2f} |")
        rows += found
    print(json.dumps({"settings": vars(args), "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
