"""Layers of all bitwidths on this machine's CPU path, beside others' products, in one command.

    python3 -m benchmarks.cpu
    python3 -m benchmarks.cpu --layer 2048x2048 --rows 512 --rounds 9

TOP/s of one layer (N x K) by rows, beside torch's bfloat16 product and, where it is installed,
onnxruntime's int8 one, and what products out of registers reach in int8; bfloat16 has half of that
on AMX, and on AVX-512 as well. All take turns in --rounds, of which the medians are shown. Rows up
to DECODE_ROWS are multiplied as in a step of decode, more as in a prefill. Prints one JSON line
last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from benchmarks.rivals import LAYER_RIVALS
from benchmarks.rivals.__main__ import installed, shape
from qllm import cli

if TYPE_CHECKING:
    from benchmarks.rivals.common import LayerBench

# Bits and group, of QLLM and of others.
OURS = (("16", -1), ("8:tc-li", -1), *((str(b), g) for b in range(2, 9) for g in (128, 32)))
OTHERS = {"torch": ("16", -1), "onnxruntime": ("8:tc-li", -1)}
COPIES = 2


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--layer", type=shape, default=(4096, 4096), metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=number, default=[1, 8, 16, 128, 512], metavar="M")
    parser.add_argument("--rounds", type=number, default=5, help="of all layers (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=number, default=cores, help="(%(default)s)")
    return parser.parse_args()


def benches(n: int, k: int, threads: int) -> Iterator[tuple[str, LayerBench]]:
    """What takes turns, and whose it is."""
    for rival, entry in installed(LAYER_RIVALS, ["qllm", *OTHERS]):
        module = entry.load()
        for bits, group in OURS if rival == "qllm" else (OTHERS[rival],):
            if k % group == 0:
                for bench in module.layers(n, k, bits, group, COPIES, threads):
                    yield rival, bench


def measured(found: list[tuple[str, LayerBench]], rows: int, rounds: int) -> list[float]:
    """Median seconds of each, in turn, after a round that is not counted."""
    times: list[list[float]] = [[] for _ in found]
    for turn in range(rounds + 1):
        for (_, bench), seconds in zip(found, times, strict=True):
            start = time.perf_counter()
            bench.run(rows)
            if turn:
                seconds.append(time.perf_counter() - start)
    return list(map(statistics.median, times))


def main() -> None:
    args = parse_args()

    import torch

    from qllm.ops.cpu import library
    from qllm.ops.cpu.limits import int8_rate, read_bandwidth

    torch.set_num_threads(args.threads)
    n, k = args.layer
    found = list(benches(n, k, args.threads))
    rate, bandwidth = int8_rate(), read_bandwidth()
    table = {rows: measured(found, rows, args.rounds) for rows in args.rows}
    print(f"{args.threads} threads, {library.about()}: int8 products out of registers at ", end="")
    print(f"{rate / 1e12:.2f} TOP/s, memory read at {bandwidth / 1e9:.1f} GB/s\n")
    print("| layer | runtime | bits | operation |", end="")
    print("".join(f" {rows} row{'s' * (rows > 1)}, ms (TOP/s) |" for rows in table))
    print("|---|---|---|---|" + "---|" * len(table))
    rows_of_json = []
    for index, (rival, bench) in enumerate(found):
        seconds = {rows: times[index] for rows, times in table.items()}
        cells = (f"{1e3 * s:.3f} ({2 * n * k * m / s / 1e12:.2f})" for m, s in seconds.items())
        print(f"| {n}x{k} | {rival} | {bench.bits} | {bench.name} | {' | '.join(cells)} |")
        row = {"rival": rival, "bits": bench.bits, "name": bench.name, "error": bench.error}
        rows_of_json.append(row | {"seconds": seconds})
    limits = {"bandwidth": bandwidth, "int8_rate": rate}
    print(json.dumps({"settings": vars(args), **limits, "rows": rows_of_json}))


if __name__ == "__main__":
    cli.run(main)
