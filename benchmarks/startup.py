"""From process start to the last token, beside what importing torch alone takes.

    python3 -m benchmarks.startup
    python3 -m benchmarks.startup --model-path MODEL.gguf

Runs the two in turn and prints the medians and the ratio; one JSON line last.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qllm import cli, hub

ROOT = Path(__file__).resolve().parent.parent


def seconds(command: list[str]) -> float:
    """Wall time of a process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--runs", type=cli.whole_number(1), default=7, help="(%(default)s)")
    parser.add_argument("--bitwidths", nargs="+", default=["16", "4", "3", "8:tc-li"])
    families = hub.bundled()
    parser.add_argument("--models", nargs="+", choices=families, default=families)
    parser.add_argument(
        "--model-path", metavar="PATH", help="one model in place of those, as it is"
    )
    args = parser.parse_args()
    cases = [
        (f"{name}-tiny", bits, ["--model-name", name, "--model-size", hub.TINY, "--bitwidth", bits])
        for name in args.models
        for bits in args.bitwidths
    ]
    if args.model_path:
        path = Path(args.model_path).absolute()
        cases = [(path.stem, "file", ["--model-path", str(path)])]
    importing = [sys.executable, "-c", "import torch"]
    seconds(importing)  # the first one reads the libraries from disk
    rows = []
    print("| model | bitwidth | import torch s | qllm_gen.py s | ratio |\n|---|---|---|---|---|")
    for name, bitwidth, options in cases:
        script = [sys.executable, "qllm_gen.py", *options]
        pairs = [(seconds(importing), seconds(script)) for _ in range(args.runs)]
        bare, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        rows.append({"model": name, "bitwidth": bitwidth, "torch": bare, "script": whole})
        print(f"| {name} | {bitwidth} | {bare:.2f} | {whole:.2f} | {ratio:.2f} |")
    print(json.dumps({"runs": args.runs, "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
