"""Decode over processes of this machine, beside what the cost model predicts.

    python3 -m benchmarks.parallel
    python3 -m benchmarks.parallel --repository facebook/opt-125m --processes 1 2

Lays out a checkpoint of the published configuration with random weights and decodes one sequence
with 1, 2 and 4 ranks of one thread each, which torchrun starts: tokens per second, bytes that a
rank sends and time that it spends in exchanges per token, and memory. The model of it takes the
speed of one process and the time of an exchange of 8 KB as they are measured. Prints one JSON line
last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from qllm import cli

ROOT = Path(__file__).resolve().parent.parent
PROMPT = list(range(5, 25))
EXCHANGE_BYTES = 8192
LOCAL_BANDWIDTH = 20e9  # bits per second through a socket of this machine: large against 8 KB


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--repository", default="facebook/opt-1.3b")
    parser.add_argument("--bitwidth", default="4", metavar="BITS")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--steps", type=cli.whole_number(1), default=50, metavar="N")
    parser.add_argument("--folder", metavar="DIR", help="a checkpoint that is laid out already")
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not args.folder:
            from tools.random_checkpoint import PUBLISHED, write_checkpoint

            write_checkpoint(folder, PUBLISHED[args.repository], kind="safetensors")
        rows = [
            measure(args, folder, count, mode)
            for count in args.processes
            for mode in (("fast", "exact") if count > 1 else ("exact",))
        ]
        print_rows(args, folder, rows)


def measure(args: object, folder: Path, count: int, mode: str) -> dict:
    """What rank 0 of so many processes found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "benchmarks.parallel", "--folder", str(folder), "--bitwidth", args.bitwidth]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TP_MODE": mode}
    command += ["--steps", str(args.steps)]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return {"processes": count, "mode": mode, **json.loads(done.stdout.splitlines()[-1])}


def work(args: object) -> None:
    """One of the processes."""
    from qllm.checkpoint.load import load_model
    from qllm.config import QuantPlan
    from qllm.parallel.pipeline import ParallelContext
    from qllm.parallel.session import ParallelConfig, session

    world, mode = int(os.environ["WORLD_SIZE"]), os.environ["TP_MODE"]
    plan = QuantPlan.parse(args.bitwidth)
    if world == 1:
        print(json.dumps(decode(load_model(Path(args.folder), plan), args.steps, None)))
        return
    with session(ParallelConfig(world, 1, mode), timeout=600, device="cpu", failed=str) as joined:
        parallel = ParallelContext(joined.tp, mode, joined.pp)
        model = load_model(Path(args.folder), plan, parallel=parallel)
        found = decode(model, args.steps, joined)
        if joined.rank == 0:
            print(json.dumps(found))


def decode(model: object, steps: int, joined: object) -> dict:
    """Times of a decode step, and of single exchanges."""
    import torch

    from qllm.memory import peak_resident_bytes, resident_bytes
    from qllm.report import rank_row

    cache = model.new_cache(1, len(PROMPT) + 2 * steps + 5)
    token = model.prefill([PROMPT], cache).argmax(-1)
    for _ in range(steps // 2 + 3):
        token = model.decode(token, cache).argmax(-1)
    links = joined and joined.links
    before = (links.sent, links.seconds, links.calls) if links else (0, 0, 0)
    start = time.perf_counter()
    for _ in range(steps):
        token = model.decode(token, cache).argmax(-1)
    seconds = (time.perf_counter() - start) / steps
    after = (links.sent, links.seconds, links.calls) if links else (0, 0, 0)
    sent, waited, calls = ((b - a) / steps for a, b in zip(before, after, strict=True))
    result = {"seconds": seconds, "sent": sent, "communication": waited, "exchanges": calls}
    result |= {"model": rank_row(model)["bytes"], "peak": peak_resident_bytes()}
    result |= {"resident": resident_bytes(), "exchange": 0.0, "gloo": 0.0}
    if joined is not None:
        x = torch.zeros(1, EXCHANGE_BYTES // 4)
        result["exchange"] = repeat(lambda: joined.tp.all_reduce(x))
        result["gloo"] = repeat(lambda: torch.distributed.all_reduce(x))
    return result


def repeat(call: object, times: int = 200) -> float:
    """Mean seconds of a call."""
    for _ in range(20):
        call()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def larger(config: object, bitwidth: str) -> tuple[object, int]:
    """OPT-66b's shape, for which 64 ranks are not too many, and what a token of it reads."""
    import torch

    from qllm.bench.runners import read_bytes
    from qllm.config import QuantPlan
    from qllm.models import FAMILIES, Decoder

    sizes = {"hidden_size": 9216, "embed_size": 9216, "intermediate_size": 36864, "head_dim": 128}
    heads = {"num_layers": 64, "num_heads": 72, "num_kv_heads": 72, "family": "opt"}
    config = replace(config, **sizes, **heads)
    linears = FAMILIES["opt"].layer_linears(config)
    specs = QuantPlan.parse(bitwidth).resolve(linears, config.num_layers)
    model = Decoder(config, specs, torch.float16)
    return config, read_bytes(model)


def print_rows(args: object, folder: Path, rows: list[dict]) -> None:
    from qllm.bench.table import tp_model_lines
    from qllm.checkpoint.reader import Checkpoint
    from qllm.checkpoint.weights import Weights
    from qllm.parallel.cost import Machine, Network, cost, table

    config = Weights(Checkpoint(folder)).config
    one = next((row for row in rows if row["processes"] == 1), rows[0])
    machine = Machine(one["model"] * one["processes"] / one["seconds"], overhead=0.0)
    print(
        "| processes | mode | ms/token | predicted | KB sent/token | predicted | "
        "ms in exchanges | predicted | exchange of 8 KB, µs | gloo's all_reduce, µs | "
        "model MB/rank | resident MB/rank |"
    )
    print("|" + "---|" * 12)
    for row in rows:
        count = row["processes"]
        wire = EXCHANGE_BYTES * (count - 1) * 8 / LOCAL_BANDWIDTH
        network = Network(LOCAL_BANDWIDTH, max(0.0, row["exchange"] - wire), per_message=0.0)
        guess = cost(config, one["model"], machine, network, tp=count, mode=row["mode"])
        row["predicted"] = asdict(guess) | {"seconds": guess.seconds}
        print(
            f"| {count} | {row['mode'] if count > 1 else ''} | {row['seconds'] * 1e3:.1f} | "
            f"{guess.seconds * 1e3:.1f} | {row['sent'] / 1e3:.0f} | "
            f"{guess.bytes / 1e3:.0f} | {row['communication'] * 1e3:.2f} | "
            f"{guess.communication * 1e3:.2f} | {row['exchange'] * 1e6:.0f} | "
            f"{row['gloo'] * 1e6:.0f} | {row['model'] / 1e6:.0f} | {row['resident'] / 1e6:.0f} |"
        )
    print("\nOPT-66b's sizes:\n")
    config, nbytes = larger(config, args.bitwidth)
    predicted = table(config, nbytes, machine)
    about = {"bitwidth": args.bitwidth, "bytes": nbytes, "bandwidth": machine.bandwidth}
    cli.print_lines(tp_model_lines(about | {"rows": predicted}))
    print(json.dumps({"repository": args.repository, "rows": rows, "table": predicted}))


if __name__ == "__main__":
    cli.run(main)
