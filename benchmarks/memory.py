"""Peak resident memory of loading and quantizing, beside the bound it is held to.

    python3 -m benchmarks.memory
    python3 -m benchmarks.memory --repository bigscience/bloom-560m --bitwidth 3 --embedding-bits 8

Lays out a checkpoint of the published configuration with random weights, loads it in a process
of its own, and compares that process's peak with: the packed model + 3 x its largest tensor + a
bare interpreter with torch imported. Prints one JSON line last.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from qllm import cli

ROOT = Path(__file__).resolve().parent.parent

BARE = "import torch; from qllm.memory import peak_resident_bytes as peak; print(peak())"
LOAD = """
import json, math, sys, time
from pathlib import Path
from qllm.checkpoint.load import load_model, module_bytes
from qllm.checkpoint.reader import Checkpoint
from qllm.bitwidths import make_plan
from qllm.memory import peak_resident_bytes
folder = Path(sys.argv[1])
start = time.perf_counter()
bitwidth, embedding = sys.argv[2:]
model = load_model(folder, make_plan(bitwidth, embedding_bits=embedding or None))
seconds = time.perf_counter() - start
infos = Checkpoint(folder).tensors.values()
sizes = [info.dtype.itemsize * math.prod(info.shape) for info in infos]
print(json.dumps({"peak": peak_resident_bytes(), "model": module_bytes(model),
                  "largest": max(sizes), "checkpoint": sum(sizes), "seconds": seconds}))
"""


def child(code: str, *args: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def main() -> None:
    from tools.random_checkpoint import PUBLISHED, write_checkpoint

    parser = cli.Parser(__doc__)
    parser.add_argument("--repository", choices=list(PUBLISHED), default="facebook/opt-1.3b")
    parser.add_argument("--bitwidth", nargs="+", default=["4"], metavar="BITS")
    parser.add_argument("--embedding-bits", metavar="BITS", help="of all of them (16)")
    parser.add_argument("--format", nargs="+", default=["safetensors", "bin"], metavar="KIND")
    args = parser.parse_args()
    bare = int(child(BARE))
    rows = []
    for kind in args.format:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), PUBLISHED[args.repository], kind=kind)
            for bitwidth in args.bitwidth:
                row = json.loads(child(LOAD, folder, bitwidth, args.embedding_bits or ""))
                bound = row["model"] + 3 * row["largest"] + bare
                rows.append({"format": kind, "bitwidth": bitwidth, **row, "bound": bound})
    print(f"{args.repository}, interpreter with torch {bare / 1e6:.0f} MB\n")
    print("| checkpoint | MB | bitwidth | model MB | largest tensor MB | peak MB | bound MB | s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = [f"{row[key] / 1e6:.0f}" for key in ("model", "largest", "peak", "bound")]
        print(
            f"| {row['format']} | {row['checkpoint'] / 1e6:.0f} | {row['bitwidth']} | "
            f"{' | '.join(sizes)} | {row['seconds']:.1f} |"
        )
    print(json.dumps({"repository": args.repository, "bare": bare, "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
