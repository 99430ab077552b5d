"""qllm_quant.py: what it saves and says, stopped or not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import processes
import pytest
from conftest import FAMILIES, ROOT, assert_user_error, run
from inside import call, call_json
from killing import contents
from quantizing import TEXT
from safetensors.torch import load_file
from shallow_models import GEN, QUANT, REF, calibrated, shallow

from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> Path:
    return shallow("opt", tmp_path_factory.mktemp("source") / "opt-shallow")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


# ---- what it prints and saves


def test_the_json_object(opt, text, tmp_path):
    target = tmp_path / "out"
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({".*": 3, r"layers\.1\.mlp": "8:tc", r"mlp\.up": 16}))
    options = ("--algorithm", "gptq", "--config", rules, *calibrated(text))
    result = call_json(QUANT, "--model-path", opt, *options, "--save", target)
    assert list(result) == ["model", "saved", "bytes", "seconds", "peak_memory", "linears"]
    assert (result["model"], result["saved"]) == ("opt-shallow", str(target))
    assert result["bytes"] == (target / "model.safetensors").stat().st_size
    assert result["seconds"] > 0 and result["peak_memory"] > 0
    rows = {row.pop("name"): row for row in result["linears"]}
    assert list(rows) == [
        *(f"layers.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.down")),
        *(f"layers.1.{name}" for name in ("attention.qkv", "attention.out", "mlp.down")),
    ]
    assert rows["layers.0.mlp.down"] | {"error": 0, "dead_channels": 0} == {
        **{"bits": 3, "group_size": 128, "scheme": "asym", "algorithm": "gptq"},
        **{"error": 0, "of": "outputs", "damp": 0.01, "dead_channels": 0},
    }
    assert 0 < rows["layers.0.mlp.down"]["error"] < 0.3
    assert 0 < rows["layers.0.mlp.down"]["dead_channels"] < 1024  # ReLU: few tokens, few channels
    last = rows["layers.1.mlp.down"]
    assert (last["bits"], last["algorithm"], last["damp"]) == ("8:tc", "rtn", 0.0)


def test_what_is_printed_for_people(opt, text, tmp_path):
    target = tmp_path / "out"
    done = call(QUANT, "--model-path", opt, "--bitwidth", "3", "--save", target)
    assert done.returncode == 0
    line = r"note: layers\.[01]\.\S+: relative error [\d.]+% of the weights\n"
    assert re.fullmatch(f"({line}){{8}}note: loads in QLLM, .*; not in vLLM: .*\n", done.stderr)
    assert re.fullmatch(
        rf"opt-shallow: 8 linears quantized in [\d.]+ s, [\d.]+ MB written to {target}\n"
        r"largest relative error: [\d.]+% of the weights of layers\.[01]\.\S+\n",
        done.stdout,
    )
    options = ("--algorithm", "gptq", "--damp", "0", *calibrated(text))
    done = call(QUANT, "--model-path", opt, *options, "--save", tmp_path / "gptq")
    assert done.returncode == 0
    notes = done.stderr.splitlines()
    assert all(line.startswith("note: ") for line in notes)
    assert re.search(r"\d linears have input channels that were zero in all of", done.stderr)
    # 128 tokens for 256 channels, and no dampening.
    assert re.search(r"layers\.0\.attention\.qkv: its Hessian is singular and took", done.stderr)


def test_refinement_is_told_of(opt, text, tmp_path):
    options = ("--algorithm", "gptq", "--bitwidth", 2, "--refine", "--refine-steps", 1)
    args = ("--model-path", opt, *options, *calibrated(text, 2, 16))
    done = call(QUANT, *args, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for part in ("attention", "mlp"):
        assert re.search(rf"note: layers\.1\.{part}: relative error .* tuned", done.stderr)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "true-sequential yes; then each layer tuned in 1 steps" in card


def test_int8_without_text_says_that_it_is_not_smoothed(opt, tmp_path):
    done = call(QUANT, "--model-path", opt, "--bitwidth", "8:tc-li", "--save", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr.startswith("note: without --dataset, int8 layers are not smoothed\n")


def test_an_input_that_is_always_zero_is_named(text, tmp_path):
    def close(state: dict) -> None:
        state["model.decoder.layers.0.fc1.bias"][:] = -100

    source = shallow("opt", tmp_path / "model", close)
    options = ("--algorithm", "gptq", *calibrated(text))
    done = call(QUANT, "--model-path", source, *options, "--save", tmp_path / "out")
    assert done.returncode == 0
    assert "the input of layers.0.mlp.down was zero in all of the calibration" in done.stderr
    assert load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_writes_the_same_as_what_is_quantized_in_loading(family, tmp_path):
    model = ("--model-name", family, "--model-size", "tiny")
    outer = "--embedding-bits" if family == "opt" else "--lm-head-bits"
    bits = ("--bitwidth", "4", *((outer, "8") if family != "bloom" else ()))
    start = run if family == "opt" else call
    done = start(QUANT, *model, *bits, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    direct = call_json(GEN, *model, *bits)
    saved = call_json(GEN, "--model-path", tmp_path / "out", "--explain")
    assert saved["results"] == direct["results"]
    assert saved["shards"] == direct["shards"]
    assert saved["bitwidth"].startswith("4")
    kernels = {row["layer"]: row["format"] for row in saved["kernels"]}
    assert kernels["layers.{0-5}.attention.qkv"] == "4 bits, group 128, asym"


def test_static_activations_need_no_other_file(opt, text, tmp_path):
    """8:tc from what is saved: no --calib, and none of its messages."""
    options = ("--bitwidth", "8:tc", *calibrated(text))
    assert call(QUANT, "--model-path", opt, *options, "--save", tmp_path / "out").returncode == 0
    done = call(GEN, "--model-path", tmp_path / "out", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["bitwidth"] == "8:tc"
    exact = call_json(GEN, "--model-path", opt)
    pairs = zip(result["results"], exact["results"], strict=True)
    assert sum(ours["tokens"][:3] == theirs["tokens"][:3] for ours, theirs in pairs) >= 2


def test_the_dequantized_twin_is_for_the_reference(opt, text, tmp_path):
    bits = ("--bitwidth", "3", "--embedding-bits", "4")
    options = (*bits, "--algorithm", "awq", *calibrated(text))
    for flags, name in (((), "saved"), (("--fake",), "fake")):
        done = call(QUANT, "--model-path", opt, *options, *flags, "--save", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "opt-shallow: 8 linears and the embedding quantized in" in done.stdout
    ours = call_json(GEN, "--model-path", tmp_path / "saved", "--dtype", "float32")
    assert (ours["embedding_bits"], ours["lm_head_bits"]) == ("4", "4")
    reference = call_json(REF, "--model-path", tmp_path / "fake", "--dtype", "float32")
    assert [row["tokens"] for row in ours["results"]] == [
        row["tokens"] for row in reference["results"]
    ]
    assert ours["bitwidth"] == "3" and reference["bitwidth"] == "16"
    rows = json.loads((tmp_path / "fake" / "weight_config.json").read_text())
    assert rows["model.decoder.layers.1.fc2"] == {
        **{"bits": 3, "group_size": 128, "scheme": "asym", "algorithm": "awq"}
    }


def test_shards(opt, tmp_path):
    options = ("--bitwidth", "4", "--shard-size", "0.0005", "--save", tmp_path / "out")
    result = call_json(QUANT, "--model-path", opt, *options)
    files = list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    assert call(GEN, "--model-path", tmp_path / "out").returncode == 0


# ---- rules


def specs_of(source: Path, target: Path, *options: object, **files: object) -> dict[str, dict]:
    """The spec of each linear that was quantized."""
    for name, value in files.items():
        (target.parent / f"{name}.json").write_text(json.dumps(value))
    args = [str(option).replace("{}", str(target.parent)) for option in options]
    rows = call_json(QUANT, "--model-path", source, *args, "--save", target)["linears"]
    return {row["name"]: (row["bits"], row["group_size"], row["scheme"]) for row in rows}


def test_rules_of_ours(opt, tmp_path):
    rules = {".*": 4, "mlp": {"bits": 3, "group_size": 32}, r"layers\.1\.mlp": 16, "out_proj": 5}
    options = ("--config", "{}/rules.json", "--group-size", 64, "--scheme", "sym")
    assert specs_of(opt, tmp_path / "out", *options, rules=rules) == {
        "layers.0.attention.qkv": (4, 64, "sym"),
        "layers.0.attention.out": (5, 64, "sym"),
        "layers.0.mlp.up": (3, 32, "sym"),
        "layers.0.mlp.down": (3, 32, "sym"),
        "layers.1.attention.qkv": (4, 64, "sym"),
        "layers.1.attention.out": (5, 64, "sym"),
    }
    model = load_model(tmp_path / "out", QuantPlan.parse("16"))
    assert model.layers[1].mlp.up.spec.bits == 16


def test_rules_of_neural_compressor(opt, tmp_path):
    rules = {
        "op_type_dict": {
            ".*": {"weight": {"bit": [4], "group_size": [64], "scheme": ["asym"]}},
        },
        "op_name_dict": {
            ".*fc1": {"weight": {"bits": 8, "group_size": -1, "scheme": "sym"}},
            r"model\.decoder\.layers\.1\..*": {"weight": {"dtype": ["fp32"]}},
        },
    }
    options = ("--config", "{}/rules.json", "--lm-head-bits", "8")
    assert specs_of(opt, tmp_path / "out", *options, rules=rules) == {
        "layers.0.attention.qkv": (4, 64, "asym"),
        "layers.0.attention.out": (4, 64, "asym"),
        "layers.0.mlp.up": (8, -1, "sym"),
        "layers.0.mlp.down": (4, 64, "asym"),
        "lm_head": (8, 128, "asym"),
    }


# ---- runs that end before they are done


Process = processes.Forked | subprocess.Popen


def start(*args: object, env: dict[str, str]) -> Process:
    return processes.start([str(ROOT / QUANT), *map(str, args)], env)


def wait_for(process: Process, journal: Path, done: int) -> None:
    """Until a run has committed so many steps."""
    for _ in range(6000):
        assert process.poll() is None, process.communicate()
        if journal.exists() and json.loads(journal.read_text())["state"].get("done", 0) >= done:
            return
        time.sleep(0.005)
    raise AssertionError


# RLIMIT_FSIZE makes the system refuse to write on, as a full disk does.
WITHOUT_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2_600_000, 2_600_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_that_is_stopped_goes_on(opt, text, tmp_path, one_thread):
    """By Ctrl-C, by a full disk, by SIGKILL: one after the other, and what is left is finished."""
    target, journal = tmp_path / "out", tmp_path / "out.partial" / "journal.json"
    options = ("--algorithm", "gptq", "--bitwidth", "3", "--group-size", 32, "--lm-head-bits", 4)
    args = ("--model-path", opt, *options, *calibrated(text, 16, 64))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    stopped = start(*args, "--save", target, env=environment)
    wait_for(stopped, journal, 1)
    stopped.send_signal(signal.SIGINT)
    out, error = stopped.communicate(timeout=300)
    assert (stopped.returncode, out) == (130, "")
    assert error.splitlines()[-2:] == [
        f"note: what is finished is kept beside {target}; the same command goes on with it",
        "qllm_quant.py: interrupted",
    ]

    words = ["-c", WITHOUT_DISK, str(ROOT / QUANT), *map(str, args), "--save", str(target)]
    full = processes.run(words, environment, timeout=300)
    assert full.returncode == 2
    assert full.stdout == ""
    lines = [line for line in full.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1 and "cannot be written (File too large)" in lines[0]
    assert lines[0].startswith(f"qllm_quant.py: error: {tmp_path / 'out.partial'}")
    assert f"note: what is finished is kept beside {target}" in full.stderr

    killed = start(*args, "--save", target, env=environment)
    wait_for(killed, journal, 2)
    killed.kill()  # what Python has not yet written is lost
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert json.loads(journal.read_text())["state"]["done"] in (2, 3)

    done = call(QUANT, *args, "--damp", "0.1", "--save", target)
    assert_user_error(done, "holds an interrupted run with option gptq", "0.1")
    # In processes of their own, too: what ran before in this one may change a product's last digit.
    for folder in (target, tmp_path / "expected"):
        assert run(QUANT, *args, "--save", folder, env=environment).returncode == 0
    assert contents(target) == contents(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]


# ---- what cannot work


def test_text_is_wikitext2_where_none_is_named(opt, tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(repository, config, *, data_files, split):
        asked.append((repository, config, split))
        return {"text": [TEXT]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = ("--model-path", opt, "--algorithm", "gptq", "--nsamples", 2, "--seqlen", 32)
    done = call("qllm_quant.py", *args, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train")]
    assert "note: calibrating on wikitext2; --dataset names another text" in done.stderr
    assert "wikitext2" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
