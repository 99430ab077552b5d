"""The measurements of the GPU kernels, where they are only known to run."""

from __future__ import annotations

import importlib
import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT, assert_user_error
from inside import call

from benchmarks.gpu import attention, everything, layers, models, start, tune, ways
from qllm.ops import phase
from qllm.ops.gpu import decode, decode_int8, device, hopper, hopper_int8, limits, prefill, tiles
from tools.random_checkpoint import opt_config

BENCHMARK = "benchmarks.gpu.__main__"
SMALL = ("--shapes", "128x256", "--repeats", "1", "--limit-size", "64", "--context", "2")


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def test_layers(gpu):
    done = call(BENCHMARK, *SMALL, "--rows", 1, 17, "--bitwidths", "3", "8:tc-li", "16")
    assert done.returncode == 0, done.stderr
    assert "| layer   | rows | name " in done.stdout
    found = last_line(done.stdout)
    ours = ("qllm 3", "qllm 8:tc-li", "qllm 16", "torch bfloat16")
    assert {(row["name"], row["rows"]) for row in found["layers"]} >= {
        (name, rows) for name in ours for rows in (1, 17)
    }
    for row in found["layers"]:
        size = row["gigabytes_per_second"] * row["microseconds"] * 1e3
        bits = {"qllm 3": 3, "qllm 8:tc-li": 8, "torch int4pack 4": 4}.get(row["name"], 16)
        assert size == pytest.approx(128 * 256 * bits / 8, rel=0.15)  # and scales
        assert row["of_bandwidth"] > 0 and row["of_arithmetic"] > 0


def test_everything_whatever_fails(gpu, monkeypatch):
    """Each part in this process, where a test fails, a model hangs, a layer breaks."""

    def begin(arguments: tuple[str, ...], seconds: float) -> everything.Ended:
        assert arguments[0] == "-m" and 0 < seconds <= everything.SECONDS
        if arguments[1] == "pytest":
            said = "[gw1] [ 50%] FAILED tests/a.py::b[c d] \ntests/a.py::b PASSED [100%]\n"
            return everything.Ended(1, said, "")
        if "--models" in arguments:
            return everything.Ended(None, "", "")
        done = call(BENCHMARK, *arguments[2:])
        return everything.Ended(done.returncode, done.stdout, done.stderr.splitlines()[-1:])

    def no_dense(bitwidth, *options, ours=layers.ours, **more):
        if bitwidth == "16":
            raise RuntimeError("CUDA error: misaligned address\nand more")
        return ours(bitwidth, *options, **more)

    monkeypatch.setattr(everything, "start", begin)
    monkeypatch.setattr(start, "run", lambda command, environment: None)
    for name, rows in (("ROWS_OF_STEPS", (1,)), ("ROWS_OF_PROMPTS", (17,))):
        monkeypatch.setattr(everything, name, rows)
    if gpu == "cpu":  # as where it can run
        monkeypatch.setattr(prefill, "unsupported_reason", lambda device: None)
        monkeypatch.setattr(prefill, "ROWS", (32,))
    monkeypatch.setattr(layers, "ours", no_dense)
    monkeypatch.setattr(everything, "TUNED", ("4",))
    monkeypatch.setattr(everything, "CANDIDATES", 1)
    for name, value in {"MANY": 20, "FEW": 17, "FROM": (17,)}.items():
        monkeypatch.setattr(tune, name, value)
    for name, value in {"KV_HEADS": 1, "DIM": 16, "GROUPS": (2,), "SEQUENCES": 1}.items():
        monkeypatch.setattr(attention, name, value)
    before = tiles.TABLE.read_text()
    tiles.table.cache_clear()
    try:
        options = ("--shapes", "64x128", "--rows", 1, 17, "--bitwidths", "4", "16")
        options += ("--models", "facebook/opt-125m")
        done = call(BENCHMARK, "--all", *SMALL, *options)
    finally:
        tiles.table.cache_clear()
    found = last_line(done.stdout)
    assert done.returncode == 1 and tiles.TABLE.read_text() == before
    assert [failure["what"] for failure in found["failures"]] == [
        *("test tests/a.py::b[c d]", "64x128, qllm 16", "model facebook/opt-125m")
    ]
    assert len(found["attention"]) == 8 and "| attention, µs" in done.stdout
    assert found["tests"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}
    assert {(row["name"], row["rows"]) for row in found["layers"]} >= {
        (name, rows) for name in ("qllm 4", "torch bfloat16") for rows in (1, 17)
    }
    measured = {row["name"] for row in found["layers"]}
    of_ways = {f"qllm 4, {way}" for way in (*ways.OF_STEPS, *ways.OF_PROMPTS)}
    assert measured >= of_ways | {"qllm q4_1", "qllm q5_1", "qllm 8:tc-li, no PDL"}
    kind = "packed-4" if prefill.unsupported_reason(torch.device(gpu)) else "prefill"
    assert kind in found["tiles"][device.architecture(torch.device(gpu))[0]]
    assert [row["name"] for row in found["start"]] == [name for name, _ in start.RUNS]
    for line in (
        "| 64x128, 17 ",
        "qllm 4, again",
        "FAILED: 64x128, qllm 16: CUDA error: misaligned address",
    ):
        assert line in done.stdout


def test_a_part_is_a_process_that_is_ended_when_it_takes_too_long():
    done = everything.start(("-c", "import sys; print(1); print(2, file=sys.stderr); exit(3)"), 60)
    assert done == everything.Ended(3, "1\n", "2")
    assert everything.start(("-c", "import time; print(1, flush=True); time.sleep(60)"), 1) == (
        None,
        "1\n",
        "",
    )


def test_what_is_started_reads_its_options(monkeypatch):
    for _, (script, *options) in start.RUNS:
        monkeypatch.setattr(sys, "argv", [script, *options, "--device", "cuda"])
        asked = importlib.import_module(script.removesuffix(".py")).parse_args()
        assert asked.json and asked.max_gen_tokens == 1 and asked.device == "cuda"
    with pytest.raises(RuntimeError, match="no_such_script"):
        start.run(("no_such_script.py",), {})


def test_a_model(gpu, monkeypatch):
    config = opt_config(64, 1, 4, vocab_size=100, max_position_embeddings=64)
    monkeypatch.setitem(models.PUBLISHED, "tiny", config)
    place = torch.device(gpu)
    row = models.measure("tiny", "4", 2, 2, {"bandwidth": 1e9}, torch.bfloat16, place)
    layers = 4 * 64 * 64 + 8 * 64 * 64
    assert layers / 2 < row["bytes"] < layers + 2 * 100 * 64 + 2 * 66 * 64 + 10_000
    assert row["of_bandwidth"] == pytest.approx(row["bytes"] / row["milliseconds"] / 1e6)


@pytest.mark.slow
def test_tuning_writes_the_table(gpu, tmp_path, monkeypatch):
    table = tmp_path / "tiles.json"
    shutil.copy(tiles.TABLE, table)
    before = json.loads(table.read_text())
    monkeypatch.setattr(tiles, "TABLE", table)
    monkeypatch.setattr(tune, "MANY", 20)
    monkeypatch.setattr(tune, "ROWS", (tiles.ROWS[0], tiles.ROWS[-1]))
    tiles.table.cache_clear()
    try:
        arguments = ("--tune", "--candidates", 2, "--bitwidths", "4", "8:tc-li")
        done = call(BENCHMARK, *SMALL, "--shapes", "64x64", *arguments)
        assert done.returncode == 0, done.stderr
        found = last_line(done.stdout)
        tiles.table.cache_clear()
        after = tiles.table()
        row = after[found["architecture"]]
        # Where weights are rounded first, one row serves the prompts of all numbers of bits.
        kinds = {"prefill" if "prefill" in found["tiles"] else "packed-4", "int8"}
        assert set(row) >= kinds and row.items() >= found["tiles"].items()
        for kind in kinds:
            options = [list(tile) for tile in tune.candidates(16)[:2]]
            assert row[kind]["tiles"]["16"] in options
        assert {name: after[name] for name in before if name != found["architecture"]}.items() <= (
            before.items()
        )
    finally:
        tiles.table.cache_clear()


@pytest.mark.slow
def test_results_of_tests_are_read_from_what_pytest_says(tmp_path):
    text = "import pytest\ndef test_a(): pass\n@pytest.mark.parametrize('x', ['1 2'])\n"
    (tmp_path / "test_it.py").write_text(text + "def test_b(x): assert False\n")
    (tests,) = (
        part for part in everything.parts([], [], [], [], [], tmp_path) if part.name == "tests"
    )
    options = ("-n", "1", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider")
    ended = everything.start((*tests.arguments[:-1], *options, str(tmp_path)), 60)
    found, said = {"failures": []}, []
    everything._read_tests(found, ended, said.append)
    assert found["tests"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}
    (failure,) = found["failures"]
    assert failure["what"].endswith("test_it.py::test_b[1 2]") and len(said) == 1


def test_tuning_finds_from_how_many_rows_on_memory_is_faster(gpu, monkeypatch):
    row, asked = {"many_rows": 1, "tiles": {}}, []

    def cost(self, rows):
        asked.append((rows, row["many_rows"]))
        in_memory = rows >= row["many_rows"]
        return 500 + rows / 4 if in_memory else rows

    monkeypatch.setattr(tune.Search, "_cost", cost)
    search = tune.Search("prefill", row, (), (), torch.device(gpu), 1, None, lambda line: None)
    search.prompts()
    assert row["many_rows"] == 768 and set(row["tiles"]) == {str(count) for count in tiles.ROWS}
    assert all(rows < limit for rows, limit in asked if limit == tune.MANY)


@pytest.mark.parametrize("way", ways.ANSWERS)
def test_ways_are_those_that_products_take(way, monkeypatch):
    place = torch.device("cuda", 0)
    for module, name in ((decode, "late_reason"), (prefill, "unsupported_reason")):
        monkeypatch.setattr(module, name, lambda device: None)
    monkeypatch.setattr(decode, "unsupported_reason", lambda device, *, offsets=False: None)
    for module in (decode_int8, hopper, hopper_int8):
        monkeypatch.setattr(module, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(prefill, "many_rows", lambda device: 500)

    def found() -> dict[str, bool]:
        few, in_cuda = prefill.many_rows(place), hopper.unsupported_reason(place) is None
        with phase.decode():
            early = decode.begins_early(place)
        return {
            "Triton": not in_cuda
            and bool(decode.unsupported_reason(place, offsets=True))
            and all(module.unsupported_reason(place) for module in (decode_int8, hopper_int8)),
            "no PDL": not early,
            "registers": few > 2048 and not in_cuda,
            "memory": few == 0 and not in_cuda,
            "scaled sums": bool(prefill.unsupported_reason(place)),
        }

    assert ways.through(way, found)() == {name: name == way for name in found()}
    assert not any(found().values())


def test_tuning_tries_what_the_decode_product_has(gpu, monkeypatch):
    """Two size classes get what is best for each, and others keep what they had."""
    shapes, place = ((4096, 4096), (4096, 22016)), torch.device(gpu)
    monkeypatch.setattr(tune.device_of, "architecture", lambda device: ("9.0", 132))
    row = {"warps_per_sm": 16, "cuts": {"8": [[9, 9]] * 4, "16": [[9, 9]] * 4}}
    classes = [search_of(row, shapes, place)._size_class(32, shape) for shape in shapes]

    def whole(cut):
        return [*cut, 1, False, False][:5]

    def costs(self, rows):
        assert phase.decoding()
        cuts = [row["cuts"][str(rows)][size_class] for size_class in classes]
        best = ([1, 2] if rows == 8 else [1, 2, 2, True, True], [rows // 8, 3])
        return [
            1
            + (row["warps_per_sm"] != 32)
            + sum(abs(a - b) for a, b in zip(whole(cut), whole(own), strict=True))
            + abs(row.get("prefetched", 0) - 32)
            for cut, own in zip(cuts, best, strict=True)
        ]

    monkeypatch.setattr(tune.Search, "_costs", costs)
    search_of(row, shapes, place).decode(row)
    assert classes == [2, 3] and row["warps_per_sm"] == 32 and row["prefetched"] == 32
    assert row["cuts"] == {
        "8": [[9, 9], [9, 9], [1, 2], [1, 3], *[[9, 9]] * 3],
        "16": [[9, 9], [9, 9], [1, 2, 2, True, True], [2, 3], *[[9, 9]] * 3],
    }


def search_of(row: dict, shapes: tuple, place: torch.device) -> tune.Search:
    return tune.Search("packed-4", row, shapes, (), place, 1, None, lambda line: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    assert_user_error(call(BENCHMARK), "no GPU to measure", "TRITON_INTERPRET=1")


def test_limits_are_of_the_operations_that_they_say(monkeypatch):
    monkeypatch.setattr(limits, "seconds", lambda calls, device: [call() for call in calls] and 0.5)
    assert limits.copy_bandwidth("cpu", 1000) == 4000
    assert limits.product_rate("cpu", 32) == limits.int8_rate("cpu", 32) == 4 * 32**3
