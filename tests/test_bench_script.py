"""qllm_bench.py as it is run: tables, trees, formats, what it refuses."""

from __future__ import annotations

import csv
import json
import weakref

import pytest
import torch
from checkpoints import copy_of
from conftest import FAMILIES, assert_user_error, run
from covering import slow_but
from cpu_paths import paths
from inside import call, call_json

from qllm.bench import speed
from qllm.bench.runners import ModelRunner
from qllm.quantize_model import quantize

BENCH = "qllm_bench.py"
TINY = ("--model-size", "tiny")
SHORT = ("-p", "8,4", "-n", "2", "-b", "1,3", "-r", "2")


@pytest.mark.parametrize(("family",), slow_but([("bloom",)], FAMILIES))
def test_throughput_beside_transformers(family, monkeypatch):
    # What the machine allows takes the longest to measure.
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    args = ("--model-name", family, "--bitwidth", "16,4", *SHORT, "--compare", "hf")
    result = call_json(BENCH, *TINY, *args)
    tests = ["pp8", "pp4", "tg2"]
    assert [(r["bitwidth"], r["batch"], r["test"]) for r in result["rows"]] == [
        (name, batch, test)
        for bitwidth in ("16", "4")
        for batch in (1, 3)
        for test in tests
        for name in (bitwidth, "transformers")
    ]
    for row in result["rows"]:
        assert row["tokens_per_second"] > 0 and len(row["seconds"]) == 2
    assert result["settings"]["p"] == [8, 4]
    assert result["threads"] > 0 and result["versions"]["qllm"]


def test_a_quantized_checkpoint_beside_what_it_was_made_from(monkeypatch, tmp_path):
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    quantize("opt-tiny", 4, save=tmp_path / "q")
    args = ("--model-path", tmp_path / "q", "-p", 4, "-n", 1, "-r", 1)
    rows = call_json(BENCH, *args, "--compare", "hf")["rows"]
    assert {row["bitwidth"] for row in rows} == {"4", "transformers"}
    other = ("--compare", "hf", "--reference", "llama-tiny")
    assert_user_error(call(BENCH, *args, *other), "another model: its family is llama, not opt")
    assert_user_error(call(BENCH, *args, *other[2:]), "does nothing without --compare")


def test_a_model_without_a_tokenizer(monkeypatch, tmp_path):
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    model = tmp_path / "model"
    copy_of("opt", model)
    (model / "tokenizer.json").unlink()
    (row,) = call_json(BENCH, "--model-path", model, "-p", 4, "-r", 1)["rows"]
    assert row["test"] == "pp4"


def test_formats(monkeypatch):
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: speed.Roofline(1e10, 1e12))
    args = (*TINY, "--bitwidth", "3", *SHORT)
    done = call(BENCH, *args)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    assert len(rows) == 2 + 6 and "tokens/s" in rows[0][7] and "±" in rows[2][7]
    done = call(BENCH, *args, "--output", "csv")
    (first, *_) = found = list(csv.DictReader(done.stdout.splitlines()))
    assert len(found) == 6
    assert (first["bitwidth"], first["test"], first["batch"]) == ("3", "pp8", "1")
    assert float(first["tokens_per_second"]) > 0
    assert json.loads(call(BENCH, *args, "--output", "json").stdout)["rows"][0]["test"] == "pp8"


def test_activations_of_8_bits(monkeypatch):
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    rows = call_json(BENCH, *TINY, "--bitwidth", "16,4", "--activation-bits", 8, *SHORT)["rows"]
    assert {(row["bitwidth"], row["activation_bits"]) for row in rows} == {("16", 16), ("4", 8)}


def test_one_model_is_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    of_decoder, before = ModelRunner.of_decoder, []

    def watched(model):
        assert not any(each() for each in before)
        before.append(weakref.ref(model))
        return of_decoder(model)

    monkeypatch.setattr(ModelRunner, "of_decoder", watched)
    call_json(BENCH, *TINY, "--bitwidth", "16,4", "-p", 4, "-n", 1, "-r", 1)
    assert len(before) == 2


def test_a_model_of_tensor_parallelism(tmp_path, monkeypatch):
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: speed.Roofline(1e10, 1e12))
    args = (*TINY, "--bitwidth", "16,4", "--tp-model")
    dense, four = call_json(BENCH, *args)["tp_models"]
    assert (dense["bitwidth"], four["bitwidth"]) == ("16", "4")
    quantize("opt-tiny", 3, save=tmp_path / "three")
    (own,) = call_json(BENCH, "--model-path", tmp_path / "three", "--tp-model")["tp_models"]
    assert (own["bitwidth"], own["embedding_bits"]) == ("3", "16")
    assert dense["bytes"] > 2 * four["bytes"]
    one, *others = dense["rows"]
    assert (one["ranks"], one["speedup"]) == (1, 1.0)
    assert one["ms"] == pytest.approx(dense["bytes"] / 1e7, rel=0.1)
    assert {row["ranks"] for row in others} == {8}  # of 8 heads, no more can have one
    done = call(BENCH, *args)
    assert done.stdout.count("| ranks ") == 2 and "at 10.0 GB/s on each rank" in done.stdout
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    assert_user_error(call(BENCH, *args), "--tp-model measures memory")


def test_what_the_machine_allows():
    paths()  # skips where there are no kernels
    found = speed.Roofline.measure("cpu")
    assert found.bandwidth > 1e8 and found.arithmetic > 1e8
    assert (speed.Roofline.measure("cuda") is None) != torch.cuda.is_available()


def test_token_by_token(tmp_path):
    """In a process, as pyllama's users call it."""
    (tmp_path / "text").write_text("He went down to the sea and looked at it for a long time. " * 9)
    args = ("--benchmark", 50, "--max-length", 16, "--check", "--dataset", tmp_path / "text")
    done = run(BENCH, *TINY, "--bitwidth", 4, *args)
    assert done.returncode == 0, done.stderr
    assert "50 tokens one by one, in 4 sequences" in done.stdout
    for words in ("median", "p90", "p99", "perplexity: ", "by prefill", "peak memory: "):
        assert words in done.stdout
    (found,) = call_json(BENCH, *TINY, "--bitwidth", 4, *args)["benchmarks"]
    assert found["perplexity"] == pytest.approx(found["perplexity_by_prefill"], rel=1e-2)
    assert 1 < found["perplexity"] < 2000
    assert len(found["seconds"]) == 50 and found["peak_memory"] > found["bytes"]
    (found,) = call_json(BENCH, *TINY, "--bitwidth", 4, "--benchmark", 9)["benchmarks"]
    assert "perplexity" not in found and found["sequences"] == 1


def test_the_tree():
    done = call(BENCH, *TINY, "--bitwidth", "4,8:tc", "--tree")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0-5 (PreNormLayer) x 6") == 2
    assert done.stdout.count("of them quantized") == 2
    assert done.stderr == ""
    first, second = call_json(BENCH, *TINY, "--bitwidth", "4,8:tc", "--tree")["trees"]
    assert (first["bitwidth"], second["bitwidth"]) == ("4", "8:tc")
    assert first["tree"]["class"] == "Decoder"
    assert first["tree"]["quantized"] == second["tree"]["quantized"] > 4_000_000


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("-p", "513"), ("pp513", "window is 512")),
        (("-n", "511"), ("tg511 takes 514", "window is 512")),
        (("-p", "0", "-n", "0"), ("leave nothing to measure",)),
        (("-p", "x"), ("'x' is not a whole number",)),
        (("-b", "0"), ("0 is too small",)),
        (("--benchmark", "1024"), ("window of 512", "--max-length 512")),
        (("--check",), ("--check does nothing without --benchmark",)),
        (("--tree", "-r", "3"), ("-r does nothing without -p or -n",)),
        (("--tree", "--kv-bits", "4"), ("--kv-bits does nothing without -p, -n or --benchmark",)),
        (("-n", "4", "--activation-bits", "8"), ("for layers of 1 to 8 bits",)),
        (("--tree", "--output", "csv"), ("csv is for the table",)),
        (("--benchmark", "9", "--dataset", "{}/text"), ("has 3 tokens, not 9",)),
        (("--benchmark", "9", "--dataset", "{}/empty"), ("there is no text",)),
        (("--bitwidth", "4,4"), ("4 more than once",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_it_refuses(args, words, tmp_path):
    (tmp_path / "text").write_text("two words")
    (tmp_path / "empty").write_text("")
    assert_user_error(call(BENCH, *TINY, *[arg.format(tmp_path) for arg in args]), *words)
