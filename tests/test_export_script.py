"""qllm_export.py, and the scripts that take the folder it writes: as they are run."""

from __future__ import annotations

import importlib.util
import json

import pytest
from conftest import assert_user_error, run, run_json, tiny
from inside import call, call_json

from qllm import onnx

EXPORT, QUANT, GEN = "qllm_export.py", "qllm_quant.py", "qllm_gen.py"
EVAL, BENCH = "qllm_eval.py", "qllm_bench.py"
STORY = "Once upon a time there was a man who lived by the sea, and he was not a happy man. "
FLOAT32 = ("--dtype", "float32")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(STORY * 40)
    (folder / "task.jsonl").write_text(json.dumps({"text": STORY + "He went to the sea"}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Llama at 4 bits: a checkpoint, and what two processes make of it."""
    folder = tmp_path_factory.mktemp("models")
    args = ("--model-path", tiny("llama"), "--bitwidth", 4, "--group-size", 32)
    assert call(QUANT, *args, "--save", folder / "int4").returncode == 0
    args = ("--model-path", folder / "int4", "--format", "onnx", "--save", folder / "onnx")
    result = run_json(EXPORT, *args)
    assert result["saved"] == str(folder / "onnx")
    written = (folder / "onnx").glob("model.onnx*")
    assert result["bytes"] == sum(path.stat().st_size for path in written)
    return folder


def test_generation_is_that_of_the_checkpoint(models):
    found = run_json(GEN, "--model-path", models / "onnx")
    assert found["bitwidth"] == "4"
    want = call_json(GEN, "--model-path", models / "int4", *FLOAT32)
    assert found["results"] == want["results"]
    streamed = call(GEN, "--model-path", models / "onnx", "--stream").stdout
    assert "float32 on cpu in onnxruntime" in streamed
    assert all(entry["text"] in streamed for entry in found["results"])


def test_evaluation_is_that_of_the_checkpoint(models, files):
    args = ("--dataset", files / "text.txt", "--tasks", files / "task.jsonl", "--window", 100)
    found, want = (
        call_json(EVAL, "--model-path", models / name, *args, *options)
        for name, options in (("onnx", ()), ("int4", FLOAT32))
    )
    (row,), (other,) = found["rows"], want["rows"]
    assert row.keys() == other.keys()
    assert row["perplexity"]["gptq"] == pytest.approx(other["perplexity"]["gptq"], rel=0.005)
    task, same = (each["tasks"]["task.jsonl"] for each in (row, other))
    assert task["perplexity"] == pytest.approx(same["perplexity"], rel=0.05)
    ours, theirs = found["fingerprints"]["onnx"], want["fingerprints"]["int4"]
    assert ours["tokenizer"] == theirs["tokenizer"]
    assert ours["model"] != theirs["model"]
    assert row.pop("algorithm") == other.pop("algorithm") != ""
    assert found["dataset"] == want["dataset"]
    for batch in (1, 8):
        again = call_json(EVAL, "--model-path", models / "onnx", *args, "--batch-size", batch)
        assert again["rows"][0]["perplexity"] == row["perplexity"]


@pytest.mark.slow
def test_benchmarks_have_the_same_columns(models, files):
    args = ("-p", 8, "-n", 3, "-b", "1,2", "-r", 1, "--benchmark", 6, "--check")
    found, want = (
        call_json(BENCH, "--model-path", models / name, *args) for name in ("onnx", "int4")
    )
    assert [row.keys() for row in found["rows"]] == [row.keys() for row in want["rows"]]
    assert [row["test"] for row in found["rows"]] == [row["test"] for row in want["rows"]]
    latency = found["benchmarks"][0]
    assert latency.keys() == want["benchmarks"][0].keys()
    assert latency["perplexity"] == pytest.approx(latency["perplexity_by_prefill"], rel=1e-2)


def test_an_onnx_folder_is_quantized(files, tmp_path):
    """GPTQ by the script, at the accuracy level that is asked for; then run."""
    args = ("--model-name", "opt", "--model-size", "tiny", "--format", "onnx")
    assert call(EXPORT, *args, "--save", tmp_path / "onnx").returncode == 0
    args = ("--algorithm", "gptq", "--bitwidth", 4, "--group-size", 32, "--accuracy-level", 1)
    text = ("--dataset", files / "text.txt", "--nsamples", 2, "--seqlen", 32)
    save = ("--model-path", tmp_path / "onnx", "--save", tmp_path / "int4")
    result = call_json(QUANT, *args, *text, *save)
    assert {row["algorithm"] for row in result["linears"]} == {"gptq"}
    written = (tmp_path / "int4").glob("model.onnx*")
    assert result["bytes"] == sum(path.stat().st_size for path in written)
    found = call_json(GEN, "--model-path", tmp_path / "int4")
    assert found["bitwidth"] == "4"
    assert all(entry["text"] for entry in found["results"])


REFUSED = [
    (GEN, ("--bitwidth", 4)),
    (GEN, ("--group-size", 32)),
    (GEN, ("--num-shards", 3)),
    (GEN, ("--compare",)),
    (GEN, ("--explain",)),
    (GEN, ("--activation-bits", 8)),
    (GEN, ("--calib", "x")),
    (GEN, ("--dtype", "bfloat16")),
    (EVAL, ("--agreement",)),
    (EVAL, ("--scheme", "sym", "--tasks", "x")),
    (BENCH, ("--tree",)),
    (BENCH, ("--compare", "hf")),
    (BENCH, ("--lm-head-bits", 4)),
    (QUANT, ("--fake", "--save", "x")),
    (QUANT, ("--format", "compressed-tensors", "--save", "x")),
    (QUANT, ("--shard-size", 1, "--save", "x")),
    (QUANT, ("--dtype", "float16", "--save", "x")),
]


@pytest.mark.parametrize(("script", "options"), REFUSED)
def test_options_that_mean_nothing_are_refused(script, options, models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = call(script, "--model-path", models / "onnx", *options)
    assert_user_error(done, options[0])


def test_an_onnx_model_is_compared_with_its_original(models, files, monkeypatch):
    """Where the checkpoint that was exported recorded what it was made from."""
    args = ("--model-path", models / "onnx", "--compare", "hf", "--tasks", files / "task.jsonl")
    result = call_json(EVAL, *args)
    assert result["compare"]["name"] == "transformers"
    monkeypatch.setattr("qllm.checkpoint.origin.base_model", lambda folder: None)
    assert_user_error(call(EVAL, *args), "name it with --reference")


@pytest.mark.parametrize("flag", ["--true-sequential", "--no-true-sequential"])
def test_gptq_of_onnx_models_is_sequential(flag, models, files, tmp_path):
    args = ("--model-path", models / "onnx", "--algorithm", "gptq", "--save", tmp_path / "x")
    done = call(QUANT, *args, flag, "--dataset", files / "text.txt")
    assert_user_error(done, "--true-sequential does nothing here")


def test_what_cannot_be_exported(models, tmp_path):
    save = ("--format", "onnx", "--save", tmp_path / "x")
    assert_user_error(call(EXPORT, "--model-path", models / "onnx", *save), "already")
    there = ("--format", "onnx", "--save", models)
    assert_user_error(call(EXPORT, "--model-path", models / "int4", *there), "is there already")
    assert_user_error(call(EXPORT, "--model-size", "tiny", "--save", "x"), "--format")
    assert_user_error(call(EXPORT, "--model-size", "tiny", *save, "--accuracy-level", 5), "0, 1, 2")
    args = (QUANT, "--model-size", "tiny", "--accuracy-level", 4, "--save", tmp_path / "x")
    assert_user_error(call(*args), "--accuracy-level is for ONNX models")
    assert not (tmp_path / "x").exists()


def test_a_broken_model_is_one_line_of_a_process(models, tmp_path):
    (tmp_path / "config.json").write_bytes((models / "onnx/config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((models / "onnx/tokenizer.json").read_bytes())
    data = (models / "onnx" / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(data)
    assert_user_error(run(GEN, "--model-path", tmp_path), "model.onnx_data", "lacks")
    (tmp_path / "model.onnx").write_bytes(data[:1000])
    assert_user_error(run(GEN, "--model-path", tmp_path), "no whole ONNX model")


@pytest.mark.parametrize("missing", [("onnx",), ("onnxruntime",), ("onnx", "onnxruntime")])
def test_without_the_extra_every_script_says_what_to_install(
    missing, models, monkeypatch, tmp_path
):
    find = importlib.util.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name in missing else find(name))
    for script, options in (
        (EXPORT, ("--format", "onnx", "--save", tmp_path / "x")),
        (QUANT, ("--save", tmp_path / "x")),
        (GEN, ()),
        (EVAL, ("--tasks", "x")),
        (BENCH, ()),
    ):
        done = call(script, "--model-path", models / "onnx", *options)
        assert_user_error(done, " and ".join(missing), "pip install onnx onnxruntime")
