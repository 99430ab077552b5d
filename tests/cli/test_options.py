"""The scripts' options: their defaults, what each refuses, and --help without torch."""

from __future__ import annotations

import argparse
import os

import pytest
import torch
from conftest import ROOT, assert_user_error, run
from inside import parsed

import qllm
from qllm import cli
from qllm.errors import UserError

# Each script, and the options that it cannot do without.
SCRIPTS = {
    **dict.fromkeys(("ref_gen.py", "qllm_gen.py", "weight_convert.py", "fake_calib_gen.py"), ()),
    "qllm_quant.py": ("--save", "out"),
}


@pytest.fixture
def without_torch(tmp_path) -> dict[str, str]:
    """The environment of a Python that has no torch, nor a script's own folder to import from."""
    shim = tmp_path / "shim" / "torch"
    shim.mkdir(parents=True)
    message = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    (shim / "__init__.py").write_text(message)
    return {**os.environ, "PYTHONPATH": str(shim.parent), "PYTHONSAFEPATH": "1"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script, without_torch):
    done = run(script, "--help", env=without_torch)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first = done.stdout.splitlines()[0]
    assert first.startswith(f"usage: {script}")
    assert f"python3 {script}" in done.stdout  # commands that run as written


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_package_is_one_line(script, without_torch):
    done = run(script, "--model-size", "tiny", *SCRIPTS[script], env=without_torch)
    assert_user_error(done, "torch is missing", "pip install -r requirements.txt")


DEFAULTS = {
    "model_name": "opt",
    "model_size": None,
    "bitwidth": None,
    "num_shards": 2,
    "max_gen_tokens": 10,
    "max_prompt_length": 20,
    "group_size": 128,
    "scheme": "asym",
    "dtype": "auto",
    "device": "auto",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults(script, monkeypatch):
    found = vars(parsed(script, monkeypatch, *SCRIPTS[script]))
    common = DEFAULTS.keys() & found.keys()
    assert {key: found[key] for key in common} == {key: DEFAULTS[key] for key in common}
    assert len(common) >= 2
    if script == "qllm_gen.py":
        assert common == DEFAULTS.keys()


@pytest.mark.parametrize(
    ("text", "words"), [("0", "too small"), ("-3", "too small"), ("1.5", "not"), ("many", "not")]
)
def test_whole_numbers(text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        cli.whole_number(1)(text)


def test_a_model_is_named_once(monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--model-path", "x", "--model-size", "tiny")
    with pytest.raises(UserError, match="name two models"):
        cli.resolve_model(args)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "", "cuda:99"])
def test_devices_that_are_not_there(device, monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--device", device)
    with pytest.raises(UserError, match="device"):
        cli.resolve_device(args)


@pytest.mark.parametrize("rank", ["0", "2"])
def test_ranks_without_a_gpu_of_their_own(rank, monkeypatch):
    """All are refused, for only the first may have said why; and nothing asks CUDA for it."""
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "3", "MASTER_PORT": "1"}
    for key, value in {**ranks, "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(key, value)
    args = parsed("qllm_gen.py", monkeypatch)
    with pytest.raises(UserError, match="3 ranks on this machine take a GPU each, and it has 2;"):
        cli.resolve_device(args, local=True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert cli.resolve_device(args, local=True) == f"cuda:{rank}" and taken == [f"cuda:{rank}"]


SCREEN = 50  # lines


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_every_script_has_a_version_and_names_that_hands_expect(script, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(script, monkeypatch, "--version")
    assert capsys.readouterr().out == f"{script} {qllm.__version__}\n"
    with pytest.raises(SystemExit):
        parsed(script, monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 2 * SCREEN
    options = {"--model": "model_path"}
    if "--threads" in shown:
        options["--threads"] = "threads"
    if "--max-gen-tokens" in shown:
        options["--max-new-tokens"] = "max_gen_tokens"
    if "--tp" in shown.split():
        options |= {"--tensor-parallel-size": "tp", "--pipeline-parallel-size": "pp"}
    given = [word for option in options for word in (option, "3")]
    needed = {"qllm_quant.py": ["--output-dir", "out"]}
    needed["qllm_export.py"] = ["--format", "onnx", "--output-dir", "out"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    found = vars(parsed(script, monkeypatch, *needed.get(script, ()), *given))
    # qllm_eval.py takes several models.
    assert {str(found[name]).strip("[']") for name in options.values()} == {"3"}
    if "--threads" in shown:
        assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("3", 3)
    else:
        assert script == "weight_convert.py"
    torch.set_num_threads(threads)


def test_ranks_name_options_where_the_library_names_parameters(monkeypatch):
    found = {}
    monkeypatch.setattr("qllm.parallel.session.session", lambda _, **given: found.update(given))
    cli.session(argparse.Namespace(tp=9, pp=1, tp_mode="exact", timeout=60, device="cpu"))
    assert found["failed"](UserError("`tp` 9 is more")) == "--tp 9 is more"
    assert found["failed"](KeyboardInterrupt()) is None
