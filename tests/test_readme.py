"""The documentation is true: every command in it runs, every option, file and link is there."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import ROOT
from inside import call
from readme import PAGES, README, TEXT, TORCHRUN, blocks, commands
from test_real_sizes import COMMANDS as REAL_SIZES

from qllm import quantize
from qllm.checkpoint.to_gguf import export_gguf
from tools import write_options

# What a script or module of the README gets besides, where the command has the first.
SMALLER = {
    "qllm_quant.py": {
        "--dataset": "--nsamples 2 --seqlen 64",
        "--refine": "--refine-steps 2",
    },
    "qllm_eval.py": {
        "--dataset": "--max-tokens 130 --window 64",
        "--bitwidth": "--bitwidth 4,2",
        "--tasks": "--limit 3",
        "--agreement": "--max-gen-tokens 2",
    },
    "benchmarks.rivals": {"--layer": "--layer 256x256"},
    "qllm_bench.py": {"-p": "-p 8 -n 2 -r 1", "--benchmark": "--benchmark 80"},
}

# The measurements take minutes; here the same commands get the smallest settings.
SMALL = {
    "benchmarks.quality": "--windows 1 --window 64 --prompts 2 --new-tokens 4 --bitwidths 8:tc 3",
    "benchmarks.memory": "--repository facebook/opt-125m --format safetensors",
    "benchmarks.parallel": "--folder tiny_models/opt-tiny --processes 2 --steps 2",
    "benchmarks.busy": "--runs 1 --prompt 4 --new 2",
    "benchmarks.startup": "--runs 1 --bitwidths 4 --models opt",
    "benchmarks.quantization": "--windows 1 --window 64 --nsamples 2 --seqlen 64 --bitwidths 3 "
    "--group-sizes -1 --models opt --refine-steps 1 --methods rtn 'gptq, refined'",
    "benchmarks.quantize": "--repository facebook/opt-125m --layers 1 --algorithms rtn --size 64",
    "benchmarks.evaluation": "--dtypes float32 --windows 1 --window 64 --repeats 1",
    "benchmarks.onnx": "--models opt --max-tokens 600 --limit 1 --nsamples 2 --seqlen 32 "
    "--repeats 1",
    "benchmarks.gpu": "--shapes 128x256 --rows 1 --bitwidths 4 --repeats 1 --limit-size 64 "
    "--parts layer",
    "benchmarks.planner": "--model opt-30b --time-limit 1 --windows 2",
    "benchmarks.attention": "--context 130 --batch 1 --rounds 1",
    "benchmarks.planned": "--models opt --bits 2,3 --group-size=-1 --uniform 2 3 --nsamples 2 "
    "--seqlen 64",
    "benchmarks.cpu": "--layer 64x128 --rows 1 32 --rounds 1",
    "benchmarks.rivals": "--rivals qllm --rows 1 --repeats 1 --megabytes 1 --prompt 8 --batches 1 "
    "--context 4 --steps 1 --rounds 1",
}

# Those that measure nothing that other work in the same process would change.
LIKE_SCRIPTS = (
    *("benchmarks.quality", "benchmarks.quantization", "benchmarks.onnx"),
    "benchmarks.evaluation",
    "benchmarks.busy",
)


def is_setup(command: str) -> bool:
    return "-m venv" in command


# Run by the tests of what they are about, which look at what comes out.
ELSEWHERE = (*REAL_SIZES, *TORCHRUN)
OTHERS = [block for block in blocks() if not any(is_setup(c) or c in ELSEWHERE for c in block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as a user has it: the project, texts and a GGUF file."""
    folder = tmp_path_factory.mktemp("readme")
    saved = set(re.findall(r"--save (\w[\w-]*)/", TEXT))  # who tried the commands has them
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in saved:
            (folder / path.name).symlink_to(path)
    text = TEXT.replace("`", "")
    for name in ("wiki.test.raw", "wiki.valid.raw"):
        (folder / name).write_text(text, encoding="utf-8")
    rows = [json.dumps({"text": line}) for line in text.splitlines() if line.count(" ") > 5]
    (folder / "lambada_test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    # A smaller model than the file of this name.
    quantize("llama-tiny", 4, group_size=32, scheme="sym", save=folder / "packed")
    export_gguf(folder / "packed", folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return folder


def shell(command: str, folder) -> subprocess.CompletedProcess:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_commands_at_real_size_are_those_that_their_tests_run():
    found = [c for c in commands() if c in REAL_SIZES]
    assert sorted(found) == sorted(REAL_SIZES)


def forked(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """What `python3 -m` does, in a process that has imported torch."""
    module, *options = words
    program = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return processes.run(["-c", program, *options], os.environ, cwd=folder)


def inside(command: str) -> list[str] | None:
    """A command's script or module and options, where it can be run in this process."""
    words = shlex.split(command)
    if words[0] != "python3" or "|" in words:
        return None
    if words[1] == "-m":
        return words[2:] if words[2] in LIKE_SCRIPTS else None
    return words[1:]


def interpret(monkeypatch):
    """Let processes run the GPU kernels, where there is no GPU in the interpreter."""
    import torch

    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")


# What takes seconds, even at its smallest: most benchmarks, those of the GPU's being called by
# tests/ops/gpu/test_benchmark.py, and what the scripts' own tests run in small. .ci/run --all runs
# all of it, and here the options are read.
LONG = (
    *(
        f"benchmarks.{name}"
        for name in (
            *("rivals", "memory", "parallel", "onnx", "quantize ", "gpu"),
            *("quality", "quantization", "startup", "planner", "planned", "cpu"),
        )
    ),
    *("qllm_plan.py", "--algorithm awq", "--report compared.html"),
)


def marked(block: list[str]) -> object:
    """A block as a case, slow where it is one of those."""
    slow = [pytest.mark.slow] * any(name in command for command in block for name in LONG)
    return pytest.param(block, marks=slow, id=" ; ".join(block))


@pytest.mark.parametrize("block", [marked(block) for block in OTHERS])
def test_commands_run(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for command in block:
        module = re.search(r"-m (benchmarks\.\w+)", command)
        if module and module[1] == "benchmarks.gpu":
            interpret(monkeypatch)
        small = f" {SMALL[module[1]]}" if module else ""
        for script, options in SMALLER.items():
            given = command.split() if script in command else ()
            small += "".join(f" {less}" for option, less in options.items() if option in given)
        words = inside(command + small)
        if words:
            done = call(*words)
        elif module and "|" not in command:
            done = forked(shlex.split(command + small)[2:], folder)
        else:
            done = shell(command + small, folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


class Parsed(Exception):  # noqa: N818 - it is what is hoped for
    """A command's options were read."""


@pytest.mark.parametrize("command", [c for c in commands() if any(name in c for name in LONG)])
def test_long_commands_have_the_options_that_they_are_given(command, monkeypatch):
    words = shlex.split(command)
    if "-m" in words:
        _, module, *options = words[words.index("-m") :]
    else:
        _, script, *options = words
        module = script.removesuffix(".py")
    if (ROOT / module.replace(".", "/")).is_dir():
        module += ".__main__"
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)
        raise Parsed

    monkeypatch.setattr(sys, "argv", [module, *options])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    import torch
    from conftest import tiny

    *generate, quantize, compressor = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for code in generate:
        exec(code, {})
        assert capsys.readouterr().out.count("\n") > 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki.valid.raw").write_text(TEXT, encoding="utf-8")
    exec(quantize, {})
    assert (tmp_path / "out" / "model.safetensors").exists()
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(4096, (1, 32), generator=draw) for _ in range(2)]
    given = {"model": str(tiny("opt")), "batches": batches, "evaluate": lambda model: 1.0}
    exec(compressor, given)
    assert (tmp_path / "saved_results" / "model.safetensors").exists()


def test_first_setup_command_prints_text_next_to_the_references(folder):
    first = next(c for c in commands() if is_setup(c))
    _, install, generate = first.split(" && ")
    assert "-r requirements.txt" in install
    out = shell(generate.replace(".venv/bin/python", "python3"), folder).stdout
    assert out.count("text:") == out.count("reference:") == 3
    assert "bitwidth 4" in out


def test_second_setup_command_is_what_ci_runs():
    _, second = (c for c in commands() if is_setup(c))
    assert second in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_page_of_options_is_what_the_parsers_say():
    assert write_options.TARGET.read_text(encoding="utf-8") == write_options.page()


def test_the_readme_is_short_and_links_lead_somewhere():
    assert len(README.encode()) <= 10_000
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


def test_the_file_tree_is_the_one_on_disk():
    tree = PAGES["docs/architecture.md"]
    names = re.findall(r"^    ([^ ,]+(?:, [^ ,]+)*) {2,}", tree, re.MULTILINE)
    names = [name for line in names for name in line.split(", ")]
    assert "qllm/ops/" in names
    for name in names:
        assert (ROOT / name).exists(), name
