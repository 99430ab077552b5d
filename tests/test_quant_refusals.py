"""qllm_quant.py: what cannot work is one line, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_user_error
from inside import call
from quantizing import TEXT
from shallow_models import QUANT, calibrated, shallow

OPTIONS = {
    "no folder to save in": (("--save",), ("--bitwidth", "4")),
    "a bitwidth": (("'9'", "8:tc-li"), ("--bitwidth", "9", "--save", "{}/out")),
    "a bitwidth of nothing": (("''", "8:tc-li"), ("--bitwidth", "", "--save", "{}/out")),
    "an algorithm": (("'obq'", "gptq"), ("--algorithm", "obq", "--save", "{}/out")),
    "a head's bits": (("'9'",), ("--lm-head-bits", "9", "--save", "{}/out")),
    "no config": (("no such file",), ("--config", "{}/c.json", "--save", "{}/out")),
    "both": (
        ("--config and --bitwidth",),
        ("--config", "{}/rules.json", "--bitwidth", "4", "--save", "{}/out"),
    ),
    "all at 16 bits": (("every layer stays at 16",), ("--bitwidth", "16", "--save", "{}/out")),
    "a group size": (("group size 0",), ("--group-size", "0", "--save", "{}/out")),
    "the folder is there": (("full is there already and not empty",), ("--save", "{}/full")),
    "the folder is a file": (("text is a file",), ("--save", "{}/text")),
    "this folder": ((". is where you are",), ("--save", ".")),
    "no calibration": (
        ("--dataset wikitext2: cannot be had", "give a file"),
        ("--algorithm", "gptq", "--save", "{}/out"),
    ),
    "no calibration for awq": (
        ("--dataset wikitext2: cannot be had", "give a file"),
        ("--algorithm", "awq", "--save", "{}/out"),
    ),
    "no calibration for 8:tc": (
        ("--dataset wikitext2: cannot be had", "give a file"),
        ("--bitwidth", "8:tc", "--save", "{}/out"),
    ),
    "gptq at 8:tc": (
        ("--algorithm gptq goes with 1 to 8 bits, not 8:tc",),
        ("--bitwidth", "8:tc", "--algorithm", "gptq", "--dataset", "{}/text", "--save", "{}/out"),
    ),
    "shards of nothing": (("--shard-size 0",), ("--shard-size", "0", "--save", "{}/out")),
    "shards of nan": (("--shard-size nan",), ("--shard-size", "nan", "--save", "{}/out")),
    "endless shards": (("--shard-size inf",), ("--shard-size", "inf", "--save", "{}/out")),
    "dampening below 0": (
        ("--damp -1",),
        ("--algorithm", "gptq", "--dataset", "{}/text", "--damp=-1", "--save", "{}/out"),
    ),
    "dampening of nan": (
        ("--damp nan",),
        ("--algorithm", "gptq", "--dataset", "{}/text", "--damp", "nan", "--save", "{}/out"),
    ),
    "alpha above 1": (
        ("--smooth-alpha 2",),
        ("--bitwidth", "8:tc", "--dataset", "{}/text", "--smooth-alpha", "2", "--save", "{}/out"),
    ),
    "alpha without text": (
        ("--smooth-alpha needs text",),
        ("--bitwidth", "8:tc-li", "--smooth-alpha", "0.5", "--save", "{}/out"),
    ),
    "no samples": (
        ("0 is too small",),
        ("--algorithm", "gptq", "--dataset", "{}/text", "--nsamples", "0", "--save", "{}/out"),
    ),
    "samples beyond the window": (
        ("--seqlen 513", "window of 512"),
        ("--algorithm", "gptq", "--dataset", "{}/text", "--seqlen", "513", "--save", "{}/out"),
    ),
    "too little text": (
        ("the text has", "one sample takes 512", "--seqlen"),
        ("--algorithm", "gptq", "--dataset", "{}/short", "--save", "{}/out"),
    ),
    "no text": (
        ("there is no text",),
        ("--algorithm", "gptq", "--dataset", "{}/empty", "--save", "{}/out"),
    ),
    "no file of text": (
        ("'nowhere.txt' is neither a file nor one of wikitext2",),
        ("--algorithm", "gptq", "--dataset", "nowhere.txt", "--save", "{}/out"),
    ),
    "a data set out of reach": (
        ("--dataset ptb: cannot be had",),
        ("--algorithm", "gptq", "--dataset", "ptb", "--save", "{}/out"),
    ),
    "text that is none": (
        ("UTF-8",),
        ("--algorithm", "gptq", "--dataset", "{}/bytes", "--save", "{}/out"),
    ),
}
# Options of one algorithm, given to one that has no use for them.
USELESS = {
    "--damp": ("0.1", "--algorithm gptq"),
    "--block-size": ("64", "--algorithm gptq"),
    "--act-order": (None, "--algorithm gptq"),
    "--no-static-groups": (None, "--algorithm gptq"),
    "--true-sequential": (None, "--algorithm gptq"),
    "--smooth-alpha": ("0.4", "8:tc-li or 8:tc"),
    "--refine": (None, "--algorithm gptq"),
    "--refine-steps": ("9", "--refine or --algorithm signround"),
    "--refine-batch": ("9", "--refine or --algorithm signround"),
    "--dataset": ("{}/text", "--algorithm gptq, awq or signround"),
    "--nsamples": ("3", "calibration"),
    "--seqlen": ("3", "calibration"),
    "--seed": ("3", "calibration"),
    "--dtype": ("float32", "calibration"),
}
OPTIONS |= {
    f"{name} of nobody": (
        (f"{name.replace('--no-', '--')} does nothing here", who),
        (name, *([value] if value else []), "--save", "{}/out"),
    )
    for name, (value, who) in USELESS.items()
}
OPTIONS["--clip of nobody"] = (
    ("--clip does nothing here",),
    ("--bitwidth", "8:tc-li", "--clip", "--save", "{}/out"),
)
OPTIONS["a seed without text"] = (
    ("--seed needs text to calibrate on",),
    ("--bitwidth", "8:tc-li", "--seed", "3", "--save", "{}/out"),
)
OPTIONS["an algorithm that no rule takes"] = (
    ("--algorithm awq does nothing here",),
    ("--config", "{}/rules.json", "--algorithm", "awq", "--save", "{}/out"),
)
OPTIONS["a group size of channels"] = (
    ("--group-size 64 does nothing", "8:tc-li and 8:tc have a scale per channel"),
    ("--bitwidth", "8:tc-li", "--group-size", "64", "--save", "{}/out"),
)
RULES = {
    "nothing is found": ({".*": 4, "q_porj": 8}, ("'q_porj' matches no layer",)),
    "a fused matrix": ({".*": 4, "q_proj": 8}, ("one fused matrix",)),
    "an algorithm": ({".*": {"bits": 4, "algorithm": "obq"}}, ("'obq'", "rtn, gptq, awq")),
    "a group size": ({".*": {"bits": 4, "group_size": -3}}, ("group size -3",)),
    "all at 16 bits": ({".*": 16}, ("every layer stays at 16 bits",)),
    "gptq without text": (
        {"mlp": {"bits": 4, "algorithm": "gptq"}},
        ("--dataset wikitext2: cannot be had",),
    ),
    "a type": (
        {"op_type_dict": {"Conv2d": {"weight": {"bit": [4]}}}},
        ("'Conv2d' does not match 'Linear'",),
    ),
    "a key": ({"op_type_dict": {}, "recipes": {}}, ("recipes",)),
}


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> Path:
    return shallow("opt", tmp_path_factory.mktemp("source") / "opt-shallow")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "short").write_text("A few words.")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "rules.json").write_text('{".*": {"bits": 4, "algorithm": "rtn"}}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "of something").touch()
    return tmp_path


def assert_nothing_is_made(folder: Path) -> None:
    names = {"text", "short", "empty", "bytes", "rules.json", "full"}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, opt, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words, args = OPTIONS[name]
    args = [arg.replace("{}", str(folder)) for arg in args]
    assert_user_error(call(QUANT, "--model-path", opt, *args), *words)
    assert_nothing_is_made(folder)


@pytest.mark.parametrize("name", RULES)
def test_rules(name, opt, folder):
    rules, words = RULES[name]
    (folder / "rules.json").write_text(json.dumps(rules))
    args = ("--config", folder / "rules.json", "--save", folder / "out")
    assert_user_error(call(QUANT, "--model-path", opt, *args), *words)
    assert_nothing_is_made(folder)


def with_nan(state: dict) -> None:
    state["model.decoder.layers.1.fc2.weight"][3, 3] = torch.nan


def too_large(state: dict) -> None:
    """Activations that float16 cannot hold."""
    state["model.decoder.layers.0.fc2.weight"] *= 1000
    state["model.decoder.layers.0.fc1.weight"] *= 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_nan, ("layers.1.fc2.weight holds NaN",)),
        (too_large, ("activations leave the range of float16", "--dtype bfloat16 or float32")),
    ],
)
def test_weights_that_cannot_be_quantized(change, words, folder, tmp_path_factory):
    source = shallow("opt", tmp_path_factory.mktemp("source") / "model", change)
    args = ("--algorithm", "gptq", *calibrated(folder / "text"), "--save", folder / "out")
    assert_user_error(call(QUANT, "--model-path", source, *args), *words)
    assert not (folder / "out").exists()
    if change is too_large:  # the rest of the advice
        (folder / "out.partial" / "journal.json").unlink()
        done = call(QUANT, "--model-path", source, *args, "--dtype", "bfloat16")
        assert done.returncode == 0, done.stderr
