"""How near the GPU kernels come to what the GPU allows, beside torch's.

    python3 -m benchmarks.gpu --all
    python3 -m benchmarks.gpu
    python3 -m benchmarks.gpu --models meta-llama/Llama-2-7b-hf --bitwidths 4
    python3 -m benchmarks.gpu --tune

Layers: a product of 1, 16 and 2048 rows, replayed as a CUDA graph over so many copies of the
weight that none is in the cache. Models: a decode step of random weights. Attention: of a prompt
and of a step, to keys and values of --kv-bits. All beside the bandwidth of a copy and the rate of a
large product, measured in the same run. --tune searches for
the tiles that are fastest here, and writes them into the kernels' table. --all runs the tests of
the GPU kernels, and measures all of that, each part in a process of its own, in less than eight
minutes: the tables are those of the README, what fails is named, and the table of tiles stays as it
is. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, everything, layers, models, start, ways
from qllm import cli
from qllm.errors import UserError, first_line
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu import limits, tiles
from qllm.report import table_lines
from tools.random_checkpoint import PUBLISHED

LAYER_COLUMNS = ("layer", "rows", "name", "us", "GB/s", "of bandwidth", "TOP/s", "of rate")
MODEL_COLUMNS = ("model", "bits", "batch", "ms", "tokens/s", "of bandwidth")
ATTENTION_COLUMNS = ("attention", "bits", "us", "share")
ROWS, ALL_ROWS = (1, 16, 2048), (1, 16, 64, 128, 512, 2048)
CACHE = 1 << 10  # bytes, where a device has none to speak of


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--shapes", nargs="*", default=["4096x11008", "8192x8192"], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=number, metavar="M")
    parser.add_argument("--bitwidths", nargs="*", default=["3", "4", "8", "8:tc-li", "16"])
    parser.add_argument(
        "--rivals", nargs="*", choices=list(layers.RIVALS), default=["torch"], help="(%(default)s)"
    )
    parser.add_argument(
        "--ways", nargs="*", choices=list(ways.ANSWERS), default=[ways.SYSTEM], metavar="WAY",
        help=f"in which this package's layers multiply: {', '.join(ways.ANSWERS)} (the first)",
    )  # fmt: skip
    parser.add_argument("--models", nargs="*", choices=list(PUBLISHED), metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=number, default=[1])
    parser.add_argument("--kv-bits", nargs="*", default=[], metavar="BITS", help="and torch")
    parser.add_argument("--start", action="store_true", help="from the start to the first token")
    parser.add_argument("--context", type=number, default=4096, help="tokens (%(default)s)")
    parser.add_argument("--steps", type=number, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=number, default=7, help="(%(default)s)")
    parser.add_argument("--all", action="store_true", help="tests, layers, models and tiles")
    parser.add_argument(
        "--parts", nargs="+", metavar="NAME", help="of --all, those whose names begin with one"
    )
    parser.add_argument("--tune", action="store_true", help="write the table of tiles")
    parser.add_argument("--table", type=Path, default=tiles.TABLE, help="the file it is written to")
    parser.add_argument("--candidates", type=number, help="tiles that --tune tries, of each kind")
    parser.add_argument(
        "--limit-size",
        type=number,
        default=limits.PRODUCT,
        metavar="N",
        help="rows and columns of the product that is the limit (%(default)s)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    device = device_here()
    if args.all:
        options = {"repeats": args.repeats, "steps": args.steps, "limit-size": args.limit_size}
        options["context"] = args.context
        wanted = partial(
            everything.parts,
            args.shapes,
            args.rows or ALL_ROWS,
            args.bitwidths,
            everything.MODELS if args.models is None else args.models,
            [f"--{name}={value}" for name, value in options.items()],
        )
        return everything.main(wanted, args.parts or [""], cli.note)
    shapes = [tuple(map(int, reversed(text.split("x")))) for text in args.shapes]
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cache = getattr(properties, "L2_cache_size", CACHE)
    if args.tune:
        return tune(args, shapes, device, cache)
    size = args.limit_size
    peaks = {
        "bandwidth": limits.copy_bandwidth(device, 16 * size * size),
        "bfloat16": limits.product_rate(device, size),
        "int8": limits.int8_rate(device, size),
    }
    about = f"{properties.name if properties else 'Triton interpreter'}, torch {torch.__version__}"
    print(
        f"{about}: copies {peaks['bandwidth'] / 1e12:.2f} TB/s, bfloat16 "
        f"{peaks['bfloat16'] / 1e12:.0f} TFLOP/s, int8 {peaks['int8'] / 1e12:.0f} TOP/s"
    )
    attempts = Attempts()
    rows = [
        row for shape in shapes for row in layer_rows(shape, args, peaks, device, cache, attempts)
    ]
    if rows:
        cli.print_lines(table_lines(LAYER_COLUMNS, [layer_cells(row) for row in rows]))
    found = []
    for name, bits, batch in product(args.models or (), args.bitwidths, args.batches):
        what = f"{name}, {bits} bits, batch {batch}"
        options = (name, bits, batch, args.steps, peaks, torch.bfloat16, device)
        found += attempts(what, models.measure, *options)
    if found:
        cli.print_lines(table_lines(MODEL_COLUMNS, [model_cells(row) for row in found]))
    attended = []
    for what, group, bits in product(attention.WHAT, attention.GROUPS, args.kv_bits):
        label = f"attention, {what}, {bits} bits, {group} heads of one key"
        given = (what, bits, group, args.context, peaks, device, args.repeats)
        attended += attempts(label, attention.measure, *given)
    if attended:
        cli.print_lines(table_lines(ATTENTION_COLUMNS, [attention_cells(row) for row in attended]))
    began = []
    if args.start:
        began = list(chain.from_iterable(attempts("start", lambda: [*start.measure(device.type)])))
        cli.print_lines(
            table_lines(("start", "seconds"), [(r["name"], f"{r['seconds']:.1f}") for r in began])
        )
    result = {"device": about, "limits": peaks, "layers": rows, "models": found}
    result |= {"attention": attended, "start": began}
    print(json.dumps(result | {"failures": attempts.failures}))
    return 1 if attempts.failures else 0


class Attempts:
    """Measurements, of which one that fails keeps none of the others from being made.

    Attributes:
        failures: what failed, and why.
    """

    def __init__(self) -> None:
        self.failures: list[dict[str, str]] = []

    def __call__(self, what: str, measure: Callable[..., Any], *arguments: object) -> list:
        """What a measurement finds, as a list of one: of none where it fails."""
        try:
            return [measure(*arguments)]
        except Exception as error:  # whatever a compiler, a driver or a rival may raise
            self.failures.append({"what": what, "error": first_line(error)})
            cli.note(f"{what}: {first_line(error)}")
            return []


def tune(
    args: argparse.Namespace, shapes: list[tuple[int, int]], device: torch.device, cache: int
) -> int:
    """Search for tiles, and save those of a kind when they are found."""
    from benchmarks.gpu import tune

    architecture, _ = device_of.architecture(device)
    found = {}
    for bitwidth in args.bitwidths:
        options = (shapes, device, cache, cli.note)
        found |= tune.search([bitwidth], *options, max_candidates=args.candidates)
        tune.save(architecture, found, args.table)
    print(json.dumps({"architecture": architecture, "tiles": found}))
    return 0


def device_here() -> torch.device:
    """The GPU, or the CPU where Triton interprets."""
    for kind in ("cuda", "cpu"):
        if device_of.unsupported_reason(kind) is None:
            return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    raise UserError(
        f"no GPU to measure: {device_of.unsupported_reason('cuda')}; TRITON_INTERPRET=1 runs the "
        "kernels on the CPU, where nothing but whether they run is to be learnt"
    )


def layer_rows(
    shape: tuple[int, int],
    args: argparse.Namespace,
    peaks: dict[str, float],
    device: torch.device,
    cache: int,
    attempts: Attempts,
) -> list[dict]:
    """Of a layer's shape (K, N), what each way of multiplying takes."""
    dtype = torch.bfloat16
    makers = {f"qllm {bits}": partial(layers.ours, bits, ways=args.ways) for bits in args.bitwidths}
    makers |= {name: layers.RIVALS[name] for name in args.rivals}
    found = []
    for name, make in makers.items():
        label = f"{shape[1]}x{shape[0]}, {name}"
        benches = attempts(label, lambda make: [*make(*shape, dtype, device, cache)], make)
        for bench, rows in product(chain.from_iterable(benches), args.rows or ROWS):
            options = (bench, shape, rows, peaks, dtype, device, args.repeats)
            found += attempts(f"{label}, {rows} rows", layers.measure, *options)
    return sorted(found, key=lambda row: row["rows"])


def layer_cells(row: dict) -> tuple[str, ...]:
    return (
        row["layer"],
        str(row["rows"]),
        row["name"],
        f"{row['microseconds']:.1f}",
        f"{row['gigabytes_per_second']:.0f}",
        f"{row['of_bandwidth']:.0%}",
        f"{row['teraops_per_second']:.1f}",
        f"{row['of_arithmetic']:.0%}",
    )


def model_cells(row: dict) -> tuple[str, ...]:
    return (
        row["model"],
        row["bitwidth"],
        str(row["batch"]),
        f"{row['milliseconds']:.3f}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['of_bandwidth']:.0%}",
    )


def attention_cells(row: dict) -> tuple[str, ...]:
    return row["what"], row["bits"], f"{row['microseconds']:.1f}", f"{row['share']:.0%}"


if __name__ == "__main__":
    cli.run(main)
