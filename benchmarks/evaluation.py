"""How fast a text is evaluated, beside the kernels' prefill and transformers.

    python3 -m benchmarks.evaluation --text wiki.test.raw

Perplexity (`gptq`) of a bundled model, beside `prefill` of the same windows with the logits of
every token, which perplexity needs, and with those of the last alone; and the same perplexity by
transformers. All in turn, tokens per second, medians. Prints one JSON line last.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from qllm import cli, hub
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan
from qllm.data import load_text
from qllm.evaluate.perplexity import PerplexityOptions, Text, perplexity
from qllm.huggingface import HuggingFaceModel
from qllm.report import table_lines
from qllm.tokenizer import Tokenizer

COLUMNS = ("model", "dtype", "bits", "perplexity", "prefill, all logits", "last logits")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--text", required=True, metavar="FILE")
    parser.add_argument("--models", nargs="+", choices=hub.bundled(), default=["opt"])
    parser.add_argument("--bitwidths", nargs="+", default=["16", "4"], metavar="BITS")
    dtypes = [name for name in cli.DTYPES if name != "auto"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    number = cli.whole_number(1)
    parser.add_argument("--window", type=number, default=512, help="tokens (%(default)s)")
    parser.add_argument("--windows", type=number, default=8, help="(%(default)s)")
    parser.add_argument("--repeats", type=number, default=5, help="(%(default)s)")
    args = parser.parse_args()
    rows = [
        row for name in args.models for dtype in args.dtypes for row in measure(name, dtype, args)
    ]
    cli.print_lines(table_lines(COLUMNS, [cells(row) for row in rows]))
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


def measure(family: str, dtype: str, args: object) -> list[dict]:
    """A row per bitwidth of a model in a type, transformers' last."""
    folder = hub.resolve(family, hub.TINY).path
    kind = getattr(torch, dtype)
    ids = Tokenizer.load(folder).encode(load_text(args.text, "evaluation"))
    text = Text("", ids[: args.window * args.windows])
    windows = [text.ids[i : i + args.window] for i in range(0, len(text.ids), args.window)]
    options = PerplexityOptions(window=args.window)
    timed: dict[tuple[str, str], Callable[[], object]] = {}
    for bitwidth in args.bitwidths:
        model = load_model(folder, QuantPlan.parse(bitwidth), dtype=kind)

        def prefill(last: bool, model: object = model) -> None:
            for window in windows:
                model.prefill([window], last=last)

        timed[bitwidth, "perplexity"] = lambda model=model: perplexity(model, text, options)
        timed[bitwidth, "all"] = lambda prefill=prefill: prefill(False)
        timed[bitwidth, "last"] = lambda prefill=prefill: prefill(True)
    reference = HuggingFaceModel.load(folder, dtype=kind)
    timed["transformers", "perplexity"] = lambda: perplexity(reference, text, options)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for repeat in range(args.repeats + 1):
        for key, run in timed.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one is not counted
                seconds[key].append(time.perf_counter() - start)
    rates = {key: len(text.ids) / statistics.median(found) for key, found in seconds.items()}
    return [
        {"model": folder.name, "dtype": dtype, "bits": bits}
        | {what: rates.get((bits, what)) for what in ("perplexity", "all", "last")}
        for bits in (*args.bitwidths, "transformers")
    ]


def cells(row: dict) -> list[str]:
    """A row as text: tokens per second."""
    rates = (row[key] for key in ("perplexity", "all", "last"))
    return [
        row["model"],
        row["dtype"],
        row["bits"],
        *("" if r is None else f"{r:.0f}" for r in rates),
    ]


if __name__ == "__main__":
    cli.run(main)
