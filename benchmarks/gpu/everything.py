"""All that a GPU is asked for, part by part: each a process of its own, which may fail or hang."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.layers import OF_GGUF
from benchmarks.gpu.ways import OF_PROMPTS, OF_STEPS
from qllm import cli
from qllm.report import finite, table_lines

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 470.0  # of all parts together
LEAST = 10.0  # with less than that left, a part is not begun
MANY = 128  # rows from which a product is measured against the rate of arithmetic
BATCHES = (1, 16)
MODELS = (
    "meta-llama/Llama-2-7b-hf",
    "facebook/opt-13b",
    "bigscience/bloom-7b1",
    "facebook/opt-125m",
)
# Rows and bitwidths that are measured in all the ways that products of steps, and of prompts, go.
ROWS_OF_STEPS, ROWS_OF_PROMPTS = (1, 16), (64, 256, 512, 768, 1024, 2048)
STEPS_OF, PROMPTS_OF, INT8_PROMPTS_OF = ("4", "8:tc-li"), ("4",), ("8:tc-li",)
TUNED, CANDIDATES = ("4", "8:tc-li", "16"), 6
# What pytest -v prints of a test, and what it prints where tests run beside each other.
OUTCOMES = ("passed", "failed", "error", "skipped")
TEST_LINE = re.compile(rf"(\S+::.+) ({'|'.join(OUTCOMES).upper()})\b")
TEST_LINE_OF_MANY = re.compile(rf"\[gw\d+\] \[ *\d+%\] ({'|'.join(OUTCOMES).upper()}) (\S+::.+)")


class Part(NamedTuple):
    """A process: what it is called, Python's arguments, and the seconds that it may take."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        status: its exit status, None where it was stopped because it took too long.
        said: its standard output.
        complaint: the last line of its standard error.
    """

    status: int | None
    said: str
    complaint: str


def start(arguments: Sequence[str], seconds: float) -> Ended:
    """Run Python with some arguments, and end it after some time."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        try:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=error,
                timeout=seconds,
                check=False,
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = None
        out.seek(0)
        error.seek(0)
        lines = error.read().strip().splitlines()
        return Ended(status, out.read(), lines[-1] if lines else "")


def parts(
    shapes: Sequence[str], rows: Sequence[int], bitwidths: Sequence[str],
    models: Sequence[str], options: Sequence[str], table: Path,
) -> Iterator[Part]:  # fmt: skip
    """What is run, in this order.

    Args:
        options: of every measurement.
        table: where the tiles go that are found.
    """
    # What kernels compile to for other GPUs is tested on machines that have time. Compiling for the
    # one at hand is most of the work, and goes on beside each other.
    without = "--ignore=tests/ops/gpu/test_compile.py"
    beside = ("-n", str(min(os.cpu_count() or 1, 12)), "--maxprocesses", "12")
    tests = ("tests/ops/gpu", "tests/parallel/test_nccl.py")  # the latter needs a GPU, too
    yield Part("tests", ("-m", "pytest", "-vv", *beside, without, *tests), 150)

    def measure(name: str, seconds: float, *arguments: str) -> Part:
        return Part(name, ("-m", "benchmarks.gpu", *options, *arguments), seconds)

    layer = ("--rows", *map(str, rows), "--shapes")
    for shape in shapes:
        yield measure(f"layer {shape}", 80, *layer, shape, "--bitwidths", *bitwidths)
    batches = ("--batches", *map(str, BATCHES), "--shapes", "--rivals")
    some = [bitwidth for bitwidth in bitwidths if bitwidth != "8"]  # those of the README's table
    for name in models:
        yield measure(f"model {name}", 90, "--models", name, "--bitwidths", *some, *batches)
    first = ("--shapes", *shapes[:1], "--bitwidths")
    few, many = (("--rows", *map(str, rows)) for rows in (ROWS_OF_STEPS, ROWS_OF_PROMPTS))
    yield measure("prompts", 60, *many, "--ways", *OF_PROMPTS, "--rivals", *first, *PROMPTS_OF)
    in_triton = ("--ways", OF_STEPS[0], "--rivals")
    yield measure("int8 prompts", 60, *many, *in_triton, *first, *INT8_PROMPTS_OF)
    yield measure("steps", 60, *few, "--ways", *OF_STEPS, "--rivals", *first, *STEPS_OF)
    nothing = ("--shapes", "--rivals", "--kv-bits")
    yield measure("attention", 60, *nothing, "torch", "16", "8", "4")
    yield measure("start", 90, "--start", "--shapes", "--rivals")
    yield measure("GGUF", 60, *layer[:-1], "--rivals", *first, *OF_GGUF)
    if importlib.util.find_spec("gemlite"):
        for shape in shapes:
            rival = (shape, "--bitwidths", "--rivals", "gemlite")
            yield measure(f"GemLite {shape}", 60, *layer, *rival)
    tune = ("--tune", "--table", str(table), "--candidates", str(CANDIDATES))
    yield measure("tiles", SECONDS, *tune, "--bitwidths", *TUNED, "--shapes", *shapes)


def run(
    wanted: Callable[[Path], Iterator[Part]], names: Sequence[str], say: Callable[[str], None]
) -> dict:
    """Run parts, whatever becomes of any.

    Args:
        wanted: all parts, where the tiles that are found go into a file.
        names: of those that are run; the beginning of a name will do.

    Returns:
        `limits`, `layers`, `models`, `attention`, `start`, `tests`, `tiles`, and `failures`: what
        failed, and why.
    """
    begin = time.monotonic()
    found = {
        "limits": {},
        "layers": [],
        "models": [],
        "attention": [],
        "start": [],
        "tests": {},
        "tiles": {},
        "failures": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tiles.json"
        for part in wanted(table):
            if not part.name.startswith(tuple(names)):
                continue
            left = SECONDS - (time.monotonic() - begin)
            if left < LEAST:
                _fail(found, part.name, "no time was left", say)
                continue
            say(f"{part.name} ...")
            ended = start(part.arguments, min(left, part.seconds))
            if part.name == "tests":
                _read_tests(found, ended, say)
            else:
                _read_measurements(found, part.name, ended, say)
        if table.exists():
            found["tiles"] = json.loads(table.read_text(encoding="utf-8"))
    found["seconds"] = time.monotonic() - begin
    return found


def _fail(found: dict, what: str, error: str, say: Callable[[str], None]) -> None:
    found["failures"].append({"what": what, "error": error})
    say(f"{what}: {error}")


def _read_tests(found: dict, ended: Ended, say: Callable[[str], None]) -> None:
    results = []
    for line in ended.said.splitlines():
        if match := TEST_LINE_OF_MANY.match(line):
            results.append((match[1].lower(), match[2].strip()))
        elif match := TEST_LINE.match(line):
            results.append((match[2].lower(), match[1]))
    found["tests"] = {one: sum(got == one for got, _ in results) for one in OUTCOMES}
    for outcome, name in results:
        if outcome in ("failed", "error"):
            _fail(found, f"test {name}", outcome, say)
    if ended.status is None:
        _fail(found, "tests", "they took too long, and were ended", say)
    elif not results:
        _fail(found, "tests", ended.complaint or f"status {ended.status}, and no result", say)


def _read_measurements(found: dict, name: str, ended: Ended, say: Callable[[str], None]) -> None:
    """Take over the JSON line that a measurement ends with."""
    try:
        result = json.loads(ended.said.splitlines()[-1])
    except (IndexError, ValueError):
        late = "it took too long, and was ended"
        _fail(
            found, name, late if ended.status is None else ended.complaint or "it says nothing", say
        )
        return
    for key in ("device", "limits"):
        found[key] = found.get(key) or result.get(key)
    for key in ("layers", "models", "attention", "start"):
        found[key] += result.get(key, [])
    for failure in result.get("failures", []):
        _fail(found, failure["what"], failure["error"], say)


def print_tables(found: dict) -> None:
    """The README's tables, ready to paste."""
    limits = found["limits"]
    if limits:
        print(
            f"{found['device']}; copies {limits['bandwidth'] / 1e12:.2f} TB/s, bfloat16 "
            f"{limits['bfloat16'] / 1e12:.0f} TFLOP/s, int8 {limits['int8'] / 1e12:.0f} TOP/s\n"
        )
    if layers := found["layers"]:
        title = f"layer, rows: µs (share of the copy bandwidth; from {MANY} rows on, of the rate)"
        ordered = sorted(layers, key=lambda r: (r["layer"], r["rows"]))
        cells = {(f"{r['layer']}, {r['rows']}", r["name"]): _layer_cell(r) for r in ordered}
        _print_grid(title, cells)
    if models := found["models"]:
        batches = " / ".join(map(str, sorted({row["batch"] for row in models})))
        title = f"whole models, ms a token, {batches} sequences (share of the copy bandwidth)"
        cells: dict[tuple[str, str], list[dict]] = {}
        for row in sorted(models, key=lambda row: row["batch"]):
            key = (row["model"].partition("/")[2] or row["model"], f"{row['bitwidth']} bits")
            cells.setdefault(key, []).append(row)
        _print_grid(title, {key: _model_cell(rows) for key, rows in cells.items()})
    if attention := found["attention"]:
        title = "attention, µs (share of the rate for a prompt, of the copy bandwidth for a step)"
        cells = {
            (row["what"], f"{row['bits']} bits" if row["bits"] != "torch" else "torch"): (
                f"{row['microseconds']:.0f} ({row['share']:.0%})"
            )
            for row in attention
        }
        _print_grid(title, cells)
    if found["start"]:
        cells = {("", row["name"]): f"{row['seconds']:.1f}" for row in found["start"]}
        _print_grid("seconds from a process's start to its first token", cells)
    for architecture, rows in found["tiles"].items():
        for kind, row in rows.items():
            print(f"tiles {architecture} {kind}: {json.dumps(row)}")
    tests = found["tests"]
    print("tests: " + (", ".join(f"{n} {outcome}" for outcome, n in tests.items()) or "none"))
    for failure in found["failures"]:
        print(f"FAILED: {failure['what']}: {failure['error']}")


def _print_grid(title: str, cells: dict[tuple[str, str], str]) -> None:
    rows, columns = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))
    body = [(row, *(cells.get((row, column), "") for column in columns)) for row in rows]
    cli.print_lines(table_lines((title, *columns), body))
    print()


def _layer_cell(row: dict) -> str:
    share = row["of_bandwidth"] if row["rows"] < MANY else row["of_arithmetic"]
    return f"{row['microseconds']:.1f} ({share:.0%})"


def _model_cell(rows: Sequence[dict]) -> str:
    times = " / ".join(f"{row['milliseconds']:.2f}" for row in rows)
    return f"{times} ({rows[0]['of_bandwidth']:.0%})"


def main(
    wanted: Callable[[Path], Iterator[Part]], names: Sequence[str], say: Callable[[str], None]
) -> int:
    """Run parts, print tables and one JSON line: 1 where something failed, else 0."""
    found = run(wanted, names, say)
    print_tables(found)
    print(json.dumps(finite(found)))
    return 1 if found["failures"] else 0
