"""The scripts on the bundled models: what they print, and that their options do their work.

Starting Python and importing torch takes longer than a bundled model does. So each script runs as
a process where that matters, and is otherwise called in this one: same options, same output.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from checkpoints import FORMS, change_json, copy_of, rewritten
from conftest import FAMILIES, run, tiny
from covering import slow_but
from inside import call, call_json
from safetensors import safe_open
from safetensors.torch import load_file

PROMPTS = ["He is working on", "He has a", "Everyone is happy and I can"]
TEXT = "\n".join(
    f"The {noun} of the {other} was not what it had been in the year {year}."
    for noun in ("house", "king", "river", "war")
    for other in ("city", "church", "people", "island")
    for year in range(1801, 1811)
)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A place in which nothing is converted or calibrated yet."""
    monkeypatch.setenv("QLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def assert_schema(result: dict, bitwidth: str, new_tokens: int = 10) -> None:
    """The object of --json, key by key."""
    keys = [key for key in result if key != "kv_cache"]  # which the reference has none of
    assert keys[:5] == ["model", "bitwidth", "results", "shards", "seconds"]
    assert isinstance(result["model"], str)
    assert result["bitwidth"] == bitwidth
    assert isinstance(result["seconds"], float)
    assert result["seconds"] > 0
    for row in result["results"]:
        assert list(row) == ["prompt", "text", "tokens", "new_tokens"]
        assert isinstance(row["prompt"], str)
        assert isinstance(row["text"], str)
        assert all(isinstance(token, int) for token in row["tokens"])
        assert row["new_tokens"] == len(row["tokens"]) <= new_tokens
    for shard in result["shards"]:
        assert list(shard) == ["layers", "bytes", "device"]
        assert isinstance(shard["bytes"], int)
    layers = [layer for shard in result["shards"] for layer in shard["layers"]]
    assert layers == list(range(6))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_print_the_same_object_and_the_same_tokens(family):
    options = ("--model-name", family, "--model-size", "tiny", "--dtype", "float32")
    reference, ours = call_json("ref_gen.py", *options), call_json("qllm_gen.py", *options)
    for result in (reference, ours):
        assert_schema(result, "16")
        assert set(result) - {"kv_cache"} == {"model", "bitwidth", "results", "shards", "seconds"}
        assert result["model"] == f"{family}-tiny"
        assert [row["prompt"] for row in result["results"]] == PROMPTS
    assert ours["results"] == reference["results"]
    assert [len(result["shards"]) for result in (reference, ours)] == [1, 2]
    held = [sum(shard["bytes"] for shard in result["shards"]) for result in (reference, ours)]
    assert held[0] == pytest.approx(held[1], rel=0.01)


def blocks(output: str) -> list[dict[str, str]]:
    """The printed results: label to value."""
    found = []
    for block in output.split("\n\n")[1:]:
        rows = [line.partition(":") for line in block.strip().splitlines()]
        found.append({label: value[12 - len(label) - 1 :] for label, _, value in rows})
    return found


@pytest.mark.parametrize("script", ["ref_gen.py", "qllm_gen.py"])
def test_what_is_printed_for_people(script):
    given = () if script == "ref_gen.py" else ("--num-shards", 2)
    done = call(script, "--model-size", "tiny", "--model-name", "bloom", *given)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^3 prompts, 30 new tokens in [\d.]+ s \([\d.]+ tokens/s\)$", done.stdout, re.M
    )
    rows = blocks(done.stdout)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row["text"].strip() and row["new tokens"] == "10" for row in rows)
    shards = re.findall(r"^shard (\d): layers ([\d-]+), [\d.]+ MB$", done.stdout, re.M)
    assert shards == ([] if script == "ref_gen.py" else [("0", "0-1"), ("1", "2-5")])
    for line in done.stderr.splitlines():
        assert line.startswith("note: ")


@pytest.mark.parametrize("script", ["ref_gen.py", "qllm_gen.py"])
def test_prompts_from_all_places(script, tmp_path):
    (tmp_path / "prompts").write_text("The king of\n\nIt was the best of times, it was the worst\n")
    start = run if script == "qllm_gen.py" else call
    done = start(
        script,
        *("--model-size", "tiny", "--max-gen-tokens", "4", "--max-prompt-length", "6", "--json"),
        *("--prompt", "He said", "--prompt", "In the year"),
        *("--prompt-file", tmp_path / "prompts", "--stdin"),
        *(("--batch-size", "2") if script == "qllm_gen.py" else ()),
        input="from the input\r\n",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    if script == "qllm_gen.py":
        assert result["kv_cache"]["sequences"] == 2
    rows = result["results"]
    expected = ["He said", "In the year", "The king of"]
    expected += ["It was the best of times, it was the worst", "from the input"]
    assert [row["prompt"] for row in rows] == expected
    assert [row["new_tokens"] for row in rows] == [4] * 5
    notes = [line for line in done.stderr.splitlines() if "loses its beginning" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: prompt 4 has ")


@pytest.mark.parametrize("family", FAMILIES)
def test_compare_shows_where_the_two_differ(family):
    options = ("--model-name", family, "--model-size", "tiny", "--compare")
    exact = call_json("qllm_gen.py", *options, "--dtype", "float32")
    for row, compared in zip(exact["results"], exact["compare"], strict=True):
        assert compared["tokens"] == row["tokens"]
        assert (compared["agree"], compared["of"]) == (10, 10)
        assert compared["first_difference"] is None
    assert_schema(exact, "16")


def test_compare_of_a_coarse_model():
    done = call("qllm_gen.py", *("--model-size", "tiny", "--bitwidth", "2", "--compare"))
    assert done.returncode == 0, done.stderr
    rows = blocks(done.stdout)
    assert [row["prompt"] for row in rows] == PROMPTS
    for row in rows:
        assert row["text"] != row["reference"]
        match = re.fullmatch(
            r'(\d+) of 10 tokens; first difference at token (\d+): ".*", reference ".*"',
            row["agreement"],
        )
        assert int(match[2]) - 1 <= int(match[1]) < 10


def test_explain_names_every_layers_kernel(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"attention": 4, r"layers\.[0-2]\.mlp": "8:tc-li"}))
    options = ("--model-size", "tiny", "--bitwidth", plan, "--explain", "--device", "cpu")
    result = call_json("qllm_gen.py", *options)
    rows = result["kernels"]
    assert result["graph_break"] is None
    assert all(set(row) == {"layer", "format", "kernel", "why"} for row in rows)
    assert all(all(row.values()) for row in rows)
    assert {(row["layer"], row["format"]) for row in rows} == {
        ("layers.{0-5}.attention.qkv", "4 bits, group 128, asym"),
        ("layers.{0-5}.attention.out", "4 bits, group 128, asym"),
        ("layers.{0-2}.mlp.up", "8:tc-li"),
        ("layers.{0-2}.mlp.down", "8:tc-li"),
        ("layers.{3-5}.mlp.up", "16 bits"),
        ("layers.{3-5}.mlp.down", "16 bits"),
        ("lm_head", "16 bits"),
    }
    done = call("qllm_gen.py", *options)
    assert "decode step: captured, then replayed\n" in done.stdout
    for row in rows:
        assert re.search(rf"^{re.escape(row['layer'])} +{row['format']} +\S.*\S", done.stdout, re.M)


def test_explain_says_that_activations_are_int8():
    options = ("--model-size", "tiny", "--bitwidth", "4", "--activation-bits", "8", "--explain")
    rows = call_json("qllm_gen.py", *options, "--device", "cpu")["kernels"]
    assert {row["layer"]: "activations as int8" in row["why"] for row in rows} == {
        row["layer"]: row["layer"] != "lm_head" for row in rows
    }


def test_stream_prints_the_same_text():
    options = ("--model-name", "llama", "--model-size", "tiny", "--bitwidth", "4")
    rows = call_json("qllm_gen.py", *options)["results"]
    done = run("qllm_gen.py", *options, "--stream")
    assert done.returncode == 0, done.stderr
    for row in rows:
        assert f"\n{row['prompt']}{row['text']}\n" in done.stdout


def test_any_number_of_shards_gives_the_same_tokens():
    options = ("--model-name", "bloom", "--model-size", "tiny", "--bitwidth", "3")
    results = {}
    for count in (1, 3, 6):
        result = call_json("qllm_gen.py", *options, "--num-shards", count)
        assert_schema(result, "3")
        assert len(result["shards"]) == count
        results[count] = (result["results"], sum(shard["bytes"] for shard in result["shards"]))
    assert results[1] == results[3] == results[6]


@pytest.mark.parametrize("bitwidth", ["1", "2", "3", "4", "5", "6", "7", "8", "8:tc-li", "16"])
def test_every_bitwidth_and_its_size(bitwidth):
    result = call_json("qllm_gen.py", "--model-size", "tiny", "--bitwidth", bitwidth)
    assert_schema(result, bitwidth)
    held = sum(shard["bytes"] for shard in result["shards"])
    bits = 8 if ":" in bitwidth else int(bitwidth)
    linears = 6 * (4 * 256 * 256 + 2 * 256 * 1024)
    rest = 2 * (4096 * 256 + 514 * 256)  # the embeddings; norms and biases are what is left
    scales = {16: 0, 8: 3 / 128}.get(bits, 3 / 128)
    assert held == pytest.approx(linears * (bits / 8 + scales) + rest, rel=0.03)


def test_one_value_per_layer():
    mixed = call_json("qllm_gen.py", "--model-size", "tiny", "--bitwidth", "4,4,8,16,8:tc-li,3")
    assert_schema(mixed, "4,4,8,16,8:tc-li,3")
    uniform = call_json("qllm_gen.py", "--model-size", "tiny", "--bitwidth", "4,4,4,4,4,4")
    plain = call_json("qllm_gen.py", "--model-size", "tiny", "--bitwidth", "4")
    assert uniform["results"] == plain["results"] != mixed["results"]
    assert uniform["shards"] == plain["shards"]


def test_group_size_scheme_and_dtype_reach_the_layers():
    options = ("--model-size", "tiny", "--bitwidth", "4", "--explain", "--dtype", "bfloat16")
    done = call("qllm_gen.py", *options, "--group-size", "-1", "--scheme", "sym", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "4 bits, channel, sym" in done.stdout
    assert "bfloat16 on cpu" in done.stdout


@pytest.mark.parametrize(("form",), slow_but([("bin-sharded",), ("safetensors-sharded",)], FORMS))
def test_every_form_of_checkpoint_runs(form, tmp_path):
    """Ours and, where it is quick, the reference, on a folder that --model-path names."""
    folder = rewritten("opt", tmp_path / "model", form)
    ours = call_json("qllm_gen.py", "--model-path", folder)
    expected = call_json("qllm_gen.py", "--model-path", tiny("opt"))
    assert ours["results"] == expected["results"]
    assert ours["model"] == "model"


@pytest.mark.parametrize(
    "form", ["bin-legacy", pytest.param("bin-sharded", marks=pytest.mark.slow)]
)
def test_the_reference_reads_torch_files_too(form, tmp_path):
    folder = rewritten("llama", tmp_path / "model", form)
    reference = call_json("ref_gen.py", "--model-path", folder, "--dtype", "float32")
    expected = call_json("qllm_gen.py", "--model-path", tiny("llama"), "--dtype", "float32")
    assert reference["results"] == expected["results"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converted_copy_is_picked_up(family, home, tmp_path):
    options = ("--model-name", family, "--model-size", "tiny")
    first = call("qllm_gen.py", *options, "--json")
    assert "note: converting the checkpoint on the fly" in first.stderr
    done = call("weight_convert.py", *options)
    copy = home / "converted" / f"{family}-tiny"
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{family}-tiny: [\d.]+ MB written to {copy}\n", done.stdout)
    second = call("qllm_gen.py", *options, "--json")
    assert f"note: reading the converted copy {copy}" in second.stderr
    results = [json.loads(run.stdout)["results"] for run in (first, second)]
    assert results[0] == results[1]


def test_a_copy_of_a_changed_model_is_stale(home, tmp_path):
    folder = copy_of("opt", tmp_path / "model")
    assert call("weight_convert.py", "--model-path", folder).returncode == 0
    change_json(folder / "config.json", init_std=0.03)
    done = call("qllm_gen.py", "--model-path", folder)
    assert done.returncode == 0
    assert "is of an older state of model; converting on the fly instead" in done.stderr
    # Converting once more replaces it, and a folder that is saved elsewhere is named by its path.
    assert call("weight_convert.py", "--model-path", folder).returncode == 0
    saved = tmp_path / "saved"
    done = call("weight_convert.py", "--model-path", folder, "--save", saved)
    assert done.returncode == 0
    done = call("qllm_gen.py", "--model-path", folder, "--json")
    assert "reading the converted copy" in done.stderr
    direct = call("qllm_gen.py", "--model-path", saved, "--json")
    assert direct.stderr == ""
    assert json.loads(direct.stdout)["results"] == json.loads(done.stdout)["results"]


@pytest.mark.parametrize("source", ["random input", "text"])
def test_calibration_is_made_found_and_used(source, home, tmp_path):
    options = ("--model-name", "opt", "--model-size", "tiny")
    (tmp_path / "text.txt").write_text(TEXT)
    dataset = ("--dataset", tmp_path / "text.txt", "--nsamples", 4, "--seqlen", 64)
    made = call("fake_calib_gen.py", *options, *(dataset if source == "text" else ()))
    assert made.returncode == 0, made.stderr
    path = home / "calibration" / "opt-tiny.safetensors"
    assert made.stdout.startswith("opt-tiny: statistics of ")
    assert made.stdout.endswith(f" in {path}\n")
    with safe_open(path, framework="pt") as file:
        about, names = file.metadata(), set(file.keys())
        ranges = file.get_tensor("layers.3.mlp.down.input")
        outputs = file.get_tensor("layers.3.mlp.down.output")
    assert about["model"] == "opt-tiny"
    assert about["source"] == (str(tmp_path / "text.txt") if source == "text" else "random input")
    linears = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    expected = {f"layers.{i}.{linear}" for i in range(6) for linear in linears}
    assert names >= {f"{name}.{side}" for name in expected for side in ("input", "output")}
    assert (ranges.shape, outputs.shape) == ((1024,), (256,))
    assert ranges.dtype == torch.float32
    assert (ranges >= 0).all()
    assert ranges.max() > 0

    static = call("qllm_gen.py", *options, "--bitwidth", "8:tc", "--json")
    assert static.returncode == 0, static.stderr
    assert f"note: activation statistics of {about['source']}: {path}" in static.stderr
    moved = path.rename(tmp_path / "moved.safetensors")
    assert call("qllm_gen.py", *options, "--bitwidth", "8:tc").returncode == 2
    named = call("qllm_gen.py", *options, "--bitwidth", "8:tc", "--json", "--calib", moved)
    assert f": {moved}" in named.stderr
    assert json.loads(named.stdout)["results"] == json.loads(static.stdout)["results"]
    if source == "text":  # good statistics make a good model
        exact = call_json("qllm_gen.py", *options)
        pairs = zip(exact["results"], json.loads(static.stdout)["results"], strict=True)
        assert sum(a["tokens"][0] == b["tokens"][0] for a, b in pairs) >= 2


def test_the_seed_draws_the_text(home, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    options = ("--model-size", "tiny", "--dataset", tmp_path / "rows.jsonl", "--seqlen", 32)
    found = []
    for seed, name in ((0, "a"), (0, "b"), (7, "c")):
        save = ("--save", tmp_path / "deep" / name, "--seed", seed, "--nsamples", 2)
        done = call("fake_calib_gen.py", *options, *save)
        assert done.returncode == 0, done.stderr
        found.append(load_file(tmp_path / "deep" / name))
    keys = found[0].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in keys)
    assert not all(torch.equal(found[0][key], found[2][key]) for key in keys)


def test_calibration_that_is_not_needed_is_named():
    done = call("qllm_gen.py", "--model-size", "tiny", "--bitwidth", "4", "--calib", "no-such-file")
    assert done.returncode == 0
    assert "note: --calib no-such-file is not used" in done.stderr


def test_the_bundled_models_need_no_network():
    """Not even where nothing says that there is none."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for script in ("ref_gen.py", "qllm_gen.py"):
        done = run(script, "--model-size", "tiny", env=environment)
        assert done.returncode == 0, done.stderr
        assert all(line.startswith("note: ") for line in done.stderr.splitlines())
