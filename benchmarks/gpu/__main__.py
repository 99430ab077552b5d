"""How near the GPU kernels come to what the GPU allows, beside torch's.

    python3 -m benchmarks.gpu
    python3 -m benchmarks.gpu --models meta-llama/Llama-2-7b-hf --bitwidths 4
    python3 -m benchmarks.gpu --tune

Layers: a product of 1, 16 and 2048 rows, replayed as a CUDA graph over so many copies of the
weight that none is in the cache. Models: a decode step of random weights. Both beside the
bandwidth of a copy and the rate of a large product, measured in the same run. --tune searches for
the tiles that are fastest here, and writes them into the kernels' table. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.gpu import layers, models
from qllm import cli
from qllm.errors import UserError
from qllm.ops.gpu import device as device_of
from qllm.ops.gpu import limits, tiles
from qllm.report import print_table
from tools.random_checkpoint import PUBLISHED

LAYER_COLUMNS = ("layer", "rows", "name", "us", "GB/s", "of bandwidth", "TOP/s", "of rate")
MODEL_COLUMNS = ("model", "bits", "batch", "ms", "tokens/s", "of bandwidth")
CACHE = 1 << 10  # bytes, where a device has none to speak of


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--shapes", nargs="*", default=["4096x11008", "8192x8192"], metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=number, default=[1, 16, 2048], metavar="M")
    parser.add_argument("--bitwidths", nargs="+", default=["3", "4", "8", "8:tc-li", "16"])
    parser.add_argument("--models", nargs="*", choices=list(PUBLISHED), default=[])
    parser.add_argument("--batches", nargs="+", type=number, default=[1])
    parser.add_argument("--steps", type=number, default=64, help="(%(default)s)")
    parser.add_argument("--repeats", type=number, default=7, help="(%(default)s)")
    parser.add_argument("--tune", action="store_true", help="write the table of tiles")
    parser.add_argument("--candidates", type=number, help="tiles that --tune tries, of each kind")
    parser.add_argument(
        "--limit-size",
        type=number,
        default=limits.PRODUCT,
        metavar="N",
        help="rows and columns of the product that is the limit (%(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = device_here()
    shapes = [tuple(map(int, reversed(text.split("x")))) for text in args.shapes]
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cache = getattr(properties, "L2_cache_size", CACHE)
    if args.tune:
        from benchmarks.gpu import tune

        architecture, _ = device_of.architecture(device)
        found = tune.search(args.bitwidths, shapes, device, cache, cli.note, most=args.candidates)
        tune.save(architecture, found, tiles.TABLE)
        print(json.dumps({"architecture": architecture, "tiles": found}))
        return
    size = args.limit_size
    most = {
        "bandwidth": limits.copy_bandwidth(device, 16 * size * size),
        "bfloat16": limits.product_rate(device, size),
        "int8": limits.int8_rate(device, size),
    }
    print(
        f"{properties.name if properties else 'Triton interpreter'}: "
        f"copies {most['bandwidth'] / 1e12:.2f} TB/s, bfloat16 {most['bfloat16'] / 1e12:.0f} "
        f"TFLOP/s, int8 {most['int8'] / 1e12:.0f} TOP/s"
    )
    rows = [row for shape in shapes for row in layer_rows(shape, args, most, device, cache)]
    if rows:
        print_table(LAYER_COLUMNS, [layer_cells(row) for row in rows])
    found = [
        models.measure(name, bits, batch, args.steps, most, torch.bfloat16, device)
        for name in args.models
        for bits in args.bitwidths
        for batch in args.batches
    ]
    if found:
        print_table(MODEL_COLUMNS, [model_cells(row) for row in found])
    print(json.dumps({"limits": most, "layers": rows, "models": found}))


def device_here() -> torch.device:
    """The GPU, or the CPU where Triton interprets."""
    for kind in ("cuda", "cpu"):
        if device_of.why_not(kind) is None:
            return torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    raise UserError(
        f"no GPU to measure: {device_of.why_not('cuda')}; TRITON_INTERPRET=1 runs the kernels on "
        "the CPU, where nothing but whether they run is to be learnt"
    )


def layer_rows(
    shape: tuple[int, int],
    args: argparse.Namespace,
    most: dict[str, float],
    device: torch.device,
    cache: int,
) -> list[dict]:
    """Of a layer's shape (K, N), what each way of multiplying takes."""
    dtype = torch.bfloat16
    found = []
    benches = (layers.ours(*shape, bits, dtype, device, cache) for bits in args.bitwidths)
    for bench in (*benches, *layers.rivals(*shape, dtype, device, cache)):
        for rows in args.rows:
            options = (most, dtype, device, args.repeats)
            found.append(layers.measure(bench, shape, rows, *options))
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


if __name__ == "__main__":
    cli.run(main)
