"""The same models in QLLM and in onnxruntime: what they say of a text, and how fast.

    python3 -m benchmarks.onnx --text wiki.test.raw --calibration-text wiki.valid.raw \\
        --tasks lambada_test.jsonl
    python3 -m benchmarks.onnx --repository facebook/opt-125m

Float32 activations everywhere. Weights are float32, or 4 bits in groups of --group-size, to
nearest or by GPTQ; onnxruntime runs the export of the same checkpoint at --accuracy-levels, and,
for GPTQ, the float32 export that was quantized as an ONNX model. All engines of one model are
timed in turn. With --repository, speed alone, of random weights of a published size, to nearest.
Prints a Markdown table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from qllm import cli, hub
from qllm.bench.runners import ModelRunner, Runner
from qllm.bench.speed import Case, measure
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan, QuantSpec
from qllm.data import load_rows, load_text, sample_windows
from qllm.evaluate.evaluation import Evaluation, evaluate
from qllm.evaluate.lambada import requests
from qllm.evaluate.perplexity import PerplexityOptions, Text
from qllm.onnx import ACCURACY_LEVELS, DEFAULT_ACCURACY_LEVEL
from qllm.onnx.export import ExportOptions, export
from qllm.onnx.quantize import OnnxJob, quantize_onnx
from qllm.onnx.runner import OnnxDecoder
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.report import table_lines
from qllm.tokenizer import Tokenizer

PREFILL, DECODE = 256, 64
FLOAT = "float32"


def in_onnxruntime(folder: Path) -> ModelRunner:
    """The ONNX model of a folder."""
    model = OnnxDecoder(folder)
    return ModelRunner(model, model.nbytes, model.read_bytes, model.multiplied)


def parse_args() -> argparse.Namespace:
    from tools.random_checkpoint import PUBLISHED

    parser = cli.Parser(__doc__)
    number = cli.whole_number(1)
    parser.add_argument("--text", metavar="FILE", help="what is predicted")
    parser.add_argument("--calibration-text", metavar="FILE", help="for GPTQ (--text)")
    parser.add_argument("--tasks", metavar="FILE", help="rows of LAMBADA")
    parser.add_argument("--repository", choices=list(PUBLISHED), help="random weights of this size")
    parser.add_argument("--models", nargs="+", default=hub.bundled(), choices=hub.bundled())
    parser.add_argument("--group-size", type=number, default=32, help="(%(default)s)")
    parser.add_argument(
        "--accuracy-levels",
        type=int,
        nargs="+",
        choices=ACCURACY_LEVELS,
        default=[0, DEFAULT_ACCURACY_LEVEL],
    )
    parser.add_argument("--max-tokens", type=number, default=20000, help="of the text")
    parser.add_argument("--limit", type=number, default=500, help="rows of the task")
    parser.add_argument("--nsamples", type=number, default=64, help="for GPTQ (%(default)s)")
    parser.add_argument("--seqlen", type=number, default=256, help="for GPTQ (%(default)s)")
    parser.add_argument("--repeats", type=number, default=5, help="of each time (%(default)s)")
    args = parser.parse_args()
    if args.repository is None and not (args.text and args.tasks):
        parser.error("--text and --tasks, or --repository, say what to measure")
    return args


def engines(
    source: Path, weights: str, folder: Path, levels: list[int]
) -> Iterator[tuple[str, Runner]]:
    """QLLM's model of a checkpoint, and onnxruntime's of its exports, by name."""
    plan = QuantPlan.uniform(QuantSpec())
    yield "QLLM", ModelRunner.of_decoder(load_model(source, plan, dtype=torch.float32))
    for level in levels if weights != FLOAT else levels[-1:]:
        target = folder / f"{weights.replace(' ', '-')}-{level}"
        export(source, target, ExportOptions(accuracy_level=level))
        name = "onnxruntime" + (f", level {level}" if weights != FLOAT else "")
        yield name, in_onnxruntime(target)


def bundled(family: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    """The rows of one bundled model."""
    source = hub.resolve(family, hub.TINY).path
    tokenizer = Tokenizer.load(source)
    text = Text.encode(load_text(args.text, "evaluation"), tokenizer, args.max_tokens)
    seen = tokenizer.encode(load_text(args.calibration_text or args.text))
    length = min(args.seqlen, len(seen))
    samples = sample_windows(seen, args.nsamples, length, seed=0)
    rows = []
    for weights in (FLOAT, "RTN INT4", "GPTQ INT4"):
        checkpoint = source
        algorithm = weights.split()[0].lower()
        if weights != FLOAT:
            checkpoint = folder / algorithm
            spec = QuantSpec.parse("4", args.group_size, "asym", algorithm)
            plan = QuantPlan.uniform(spec)
            given = samples if algorithm == "gptq" else None
            quantize_checkpoint(Job(source, plan, samples=given, dtype=torch.float32), checkpoint)
        found = dict(engines(checkpoint, weights, folder, args.accuracy_levels))
        if algorithm == "gptq":
            level, target = args.accuracy_levels[-1], folder / "quantized"
            job = OnnxJob(folder / f"{FLOAT}-{level}", plan, samples=samples, accuracy_level=level)
            quantize_onnx(job, target)
            found[f"onnxruntime, level {level}, quantized there"] = in_onnxruntime(target)
        rows += measured(source.name, weights, found, args)
        config = found["QLLM"].model.config
        tasks = {"lambada": requests(load_rows(args.tasks)[: args.limit], tokenizer, config)}
        asked = Evaluation(text, PerplexityOptions(), tasks)
        for row, runner in zip(rows[-len(found) :], found.values(), strict=True):
            answers = evaluate(runner.model, asked)
            row["perplexity"] = answers["perplexity"]["gptq"]
            row["lambada"] = answers["tasks"]["lambada"]
    return rows


def measured(
    model: str, weights: str, found: dict[str, Runner], args: argparse.Namespace
) -> list[dict]:
    """A row per engine, with its speeds."""
    config = found["QLLM"].model.config
    rows = [
        {"model": model, "weights": weights, "engine": name, "bytes": runner.nbytes}
        for name, runner in found.items()
    ]
    for key, case in (("prefill", Case("pp", PREFILL, 1)), ("decode", Case("tg", DECODE, 1))):
        times = measure(list(found.values()), case, args.repeats, config, "cpu")
        for row, each in zip(rows, times, strict=True):
            row[key] = each["tokens_per_second"]
    return rows


def published(args: argparse.Namespace, folder: Path) -> list[dict]:
    """The rows of random weights."""
    from tools.random_checkpoint import PUBLISHED, write_checkpoint

    source, checkpoint = folder / "float", folder / "rtn"
    write_checkpoint(source, PUBLISHED[args.repository])
    plan = QuantPlan.uniform(QuantSpec.parse("4", args.group_size))
    quantize_checkpoint(Job(source, plan), checkpoint)
    rows = []
    for weights, path in ((FLOAT, source), ("RTN INT4", checkpoint)):
        found = dict(engines(path, weights, folder, args.accuracy_levels))
        rows += measured(args.repository, weights, found, args)
    return rows


def main() -> None:
    args = parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if args.repository:
            rows = published(args, Path(folder))
        for family in () if args.repository else args.models:
            rows += bundled(family, args, Path(folder) / family)
    columns = ["model", "weights", "engine", "MB"]
    if not args.repository:
        columns += ["LAMBADA accuracy", "LAMBADA perplexity", "perplexity"]
    columns += [f"prefill of {PREFILL}, tokens/s", "decode, tokens/s"]
    cli.print_lines(table_lines(columns, [cells(row) for row in rows]))
    print(json.dumps({"settings": vars(args), "rows": rows}))


def cells(row: dict) -> list[str]:
    """A row as text."""
    found = [row["model"], row["weights"], row["engine"], f"{row['bytes'] / 1e6:.1f}"]
    if "lambada" in row:
        task = row["lambada"]
        found += [f"{task['accuracy']:.2%}", f"{task['perplexity']:.4g}"]
        found.append(f"{row['perplexity']:.2f}")
    return [*found, f"{row['prefill']:.0f}", f"{row['decode']:.0f}"]


if __name__ == "__main__":
    cli.run(main)
