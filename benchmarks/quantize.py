"""Speed and memory of quantizing: a checkpoint's RTN beside a copy of it, and GPTQ's solver.

    python3 -m benchmarks.quantize
    python3 -m benchmarks.quantize --repository meta-llama/Llama-2-7b-hf --algorithms rtn
    python3 -m benchmarks.quantize --repository meta-llama/Llama-2-7b-hf --layers 2

Lays out a checkpoint of the published configuration with random weights, quantizes it in a process
of its own, and prints that process's time and peak memory, beside the time that a copy of the
checkpoint takes in the same run. Then the GPTQ solver on one matrix, beside a Cholesky
factorization and a product of its size. GPTQModel's solver runs beside it where that is installed.
Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from qllm import cli
from qllm.ops.reference import dequantize
from qllm.quant.gptq import quantize_gptq
from qllm.quant.inputs import output_error
from qllm.quant.rtn import fake_quantize
from tools.random_checkpoint import PUBLISHED, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--repository", choices=list(PUBLISHED), default="facebook/opt-1.3b")
    parser.add_argument(
        "--layers", type=number, metavar="N", help="instead of the published number"
    )
    parser.add_argument("--algorithms", nargs="+", default=["rtn", "gptq"], metavar="NAME")
    parser.add_argument("--bitwidth", default="4", metavar="BITS")
    parser.add_argument("--nsamples", type=number, default=128, help="(%(default)s)")
    parser.add_argument("--seqlen", type=number, default=2048, help="(%(default)s)")
    parser.add_argument("--size", type=number, default=4096, help="of the matrix (%(default)s)")
    parser.add_argument("--folder", metavar="DIR", help="for the checkpoints (a temporary one)")
    return parser.parse_args()


def copy_seconds(source: Path, target: Path) -> float:
    """Copy a checkpoint to the disk, and take the copy away again."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def measure_checkpoint(args: argparse.Namespace, tmp_dir: Path) -> list[dict]:
    """A row per algorithm, and the copy's first."""
    config = dict(PUBLISHED[args.repository])
    if args.layers:
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = args.layers
    source = tmp_dir / "source"
    write_checkpoint(source, config)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    rows = [{"what": "copy", "bytes": size, "seconds": copy_seconds(source, tmp_dir / "copy")}]
    for algorithm in args.algorithms:
        target = tmp_dir / algorithm
        command = [sys.executable, ROOT / "qllm_quant.py", "--model-path", source, "--json"]
        command += ["--bitwidth", args.bitwidth, "--algorithm", algorithm, "--save", target]
        if algorithm != "rtn":
            text = tmp_dir / "text"
            text.write_text((ROOT / "README.md").read_text(encoding="utf-8") * 8, encoding="utf-8")
            command += ["--dataset", text, "--nsamples", args.nsamples, "--seqlen", args.seqlen]
        done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
        found = json.loads(done.stdout)
        seconds, peak = found["seconds"], found["peak_memory"]
        rows.append({"what": algorithm, "seconds": seconds, "peak": peak})
        shutil.rmtree(target)
    return rows


def measure_solver(size: int) -> list[dict]:
    """GPTQ's solver on a square matrix, what it is held to, and GPTQModel's where there is one."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=draw) * 0.02
    x = torch.randn(2 * size, size, generator=draw) @ torch.randn(size, size, generator=draw)
    hessian = x.t() @ x / len(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size)

    def best(function: object, runs: int = 3) -> float:
        seconds = []
        for _ in range(runs):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def error(found: torch.Tensor) -> float:
        return output_error(found.float() - weight, hessian)

    rows = [
        {"what": "Cholesky factorization", "seconds": best(lambda: torch.linalg.cholesky(damped))},
        {"what": "matrix product", "seconds": best(lambda: weight @ hessian)},
    ]
    for group_size in (-1, 128):
        form = (4, group_size, "asym")
        seconds = best(lambda form=form: quantize_gptq(weight, hessian, *form))
        packed, _ = quantize_gptq(weight, hessian, *form)
        found = dequantize(*packed[:3], 4, group_size, size, torch.float32)
        nearest = error(fake_quantize(weight, *form))
        row = {"what": f"GPTQ, 4 bits, group {group_size}", "seconds": seconds}
        rows.append(row | {"error": error(found) / nearest})
        if importlib.util.find_spec("gptqmodel"):
            seconds, found = rival(weight, x, group_size)
            row = {"what": f"GPTQModel's, group {group_size}", "seconds": seconds}
            rows.append(row | {"error": error(found) / nearest})
    return rows


def rival(weight: torch.Tensor, x: torch.Tensor, group_size: int) -> tuple[float, torch.Tensor]:
    """Seconds and values of GPTQModel's solver for the same inputs and settings."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = weight.clone()
    settings = {"desc_act": True, "static_groups": True, "act_group_aware": False, "sym": False}
    task = GPTQ(linear, QuantizeConfig(bits=4, group_size=group_size, **settings))
    task.quantizer.configure(perchannel=True)
    task.add_batch(x[None], linear(x[None]).detach())
    start = time.perf_counter()
    found = task.quantize()[0]
    return time.perf_counter() - start, found


def main() -> None:
    args = parse_args()
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp_dir:
        rows = measure_checkpoint(args, Path(tmp_dir))
    size = rows[0]["bytes"]
    print(f"{args.repository}, {size / 1e9:.2f} GB\n")
    print("| | s | GB/s | peak MB |\n|---|---|---|---|")
    for row in rows:
        peak = f"{row['peak'] / 1e6:.0f}" if "peak" in row else ""
        rate = f"{size / row['seconds'] / 1e9:.2f}"
        print(f"| {row['what']} | {row['seconds']:.1f} | {rate} | {peak} |")
    solver = measure_solver(args.size)
    print(f"\n{args.size} x {args.size}\n\n| | s | error, of RTN's |\n|---|---|---|")
    for row in solver:
        error = f"{row['error']:.3f}" if "error" in row else ""
        print(f"| {row['what']} | {row['seconds']:.2f} | {error} |")
    print(json.dumps({"settings": vars(args), "rows": rows, "solver": solver}))


if __name__ == "__main__":
    cli.run(main)
