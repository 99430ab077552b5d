"""How fast a model is on a machine that others use too: a busy process on each of its cores.

    python3 -m benchmarks.busy

Times the prefill of a short prompt and the decode behind one token, on all cores and on one, idle
and busy. A figure is tokens over seconds of all runs, which take turns: what a user waits for,
where a median would leave out those that were held up. Prints one JSON line last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qllm import cli, hub


@contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """A process on each core that computes all the time."""
    processes = []
    try:
        for core in cores:
            program = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile 1: 0"
            command = [sys.executable, "-c", program]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        for process in processes:
            process.stdout.readline()  # it has begun
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def main() -> None:
    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--model", choices=hub.bundled(), default="opt")
    parser.add_argument("--bitwidth", default="4", help="(%(default)s)")
    parser.add_argument("--prompt", type=number, default=32, help="to prefill (%(default)s)")
    parser.add_argument("--new", type=number, default=64, help="to decode (%(default)s)")
    parser.add_argument("--runs", type=number, default=100, help="of each (%(default)s)")
    args = parser.parse_args()

    import torch

    from qllm.bench.runners import ModelRunner
    from qllm.bench.speed import Case, seconds_of
    from qllm.checkpoint.load import load_model
    from qllm.config import QuantPlan

    folder = hub.resolve(args.model, hub.TINY).path
    model = load_model(folder, QuantPlan.parse(args.bitwidth), dtype=torch.float16)
    runner, vocab = ModelRunner.of_decoder(model), model.config.vocab_size
    cases = [Case("pp", args.prompt, 1), Case("tg", args.new, 1)]
    cores, before = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    rows = []
    print("| busy cores | threads | prefill, tokens/s | decode, tokens/s |\n|---|---|---|---|")
    for loaded in ([], cores):
        seconds = {(n, case): 0.0 for n in dict.fromkeys((1, len(cores))) for case in cases}
        with busy(loaded):
            for run in range(1 + args.runs):  # the first warms up
                for threads, case in seconds:
                    torch.set_num_threads(threads)
                    took = seconds_of(runner, case, vocab)
                    seconds[threads, case] += took if run else 0
        for threads in dict.fromkeys(n for n, _ in seconds):
            rates = [case.tokens * args.runs / seconds[threads, case] for case in cases]
            rows.append({"busy": len(loaded), "threads": threads, "tokens_per_second": rates})
            print(
                f"| {len(loaded)} | {threads} |", " | ".join(f"{rate:.0f}" for rate in rates), "|"
            )
    torch.set_num_threads(before)
    print(json.dumps({"settings": vars(args), "rows": rows}))


if __name__ == "__main__":
    cli.run(main)
