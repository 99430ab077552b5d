"""How a run ends: mistakes, Ctrl-C, a closed pipe, a missing package; and how soon it answers."""

from __future__ import annotations

import io
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import processes
import pytest
import torch
from conftest import ROOT, assert_user_error, run, tiny
from covering import slow_but

import qllm
from qllm import cli
from qllm.cli import bars, console
from qllm.errors import UserError
from qllm.tokenizer import Tokenizer

# Each script, and the options that it cannot do without.
SCRIPTS = {
    **dict.fromkeys(("ref_gen.py", "qllm_gen.py", "weight_convert.py", "fake_calib_gen.py"), ()),
    "qllm_quant.py": ("--save", "out"),
}


def script_of(body: str) -> str:
    """A script whose main has this body; sys, os, signal and cli are imported."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = "import os, signal, sys\nfrom qllm import cli\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # under nohup it is ignored
    return f"{code}def main():\n{lines}\ncli.run(main)\n"


def run_main(body: str, **options) -> subprocess.CompletedProcess:
    """Run a script whose main has this body."""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "timeout": 300, **options}
    return subprocess.run([sys.executable, "-c", script_of(body)], check=False, **options)


ENDINGS = {
    "well": ("print('done')", 0, ""),
    "a mistake": (
        "from qllm.errors import UserError\nraise UserError('four\\nfive  six')",
        2,
        "-c: error: four five six\n",
    ),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, "-c: interrupted\n"),
    "SIGTERM": ("os.kill(os.getpid(), 15)\nsignal.pause()", 143, "-c: terminated\n"),
    "SIGHUP": ("os.kill(os.getpid(), 1)\nsignal.pause()", 129, "-c: ended with its terminal\n"),
    "what a terminal would obey": (
        "from qllm.errors import UserError\n"
        "raise UserError(f'a \x1b[31mb\x9bc \u202e{chr(0xDCFF)}')",
        2,
        "-c: error: a \\u001b[31mb\\u009bc \\u202e\\udcff\n",
    ),
    "a note of one": ("cli.note('\x07')", 0, "note: \\u0007\n"),
    "an option of one": ("cli.Parser('x').error('\x1b')", 2, "-c: error: \\u001b (--help"),
    "the system": ("open('/no/file')", 2, "-c: error: [Errno 2] No such file"),
    "memory": ("raise MemoryError", 1, "-c: error: out of memory; take fewer bits"),
    "torch's memory": (
        "raise RuntimeError('CUDA out of memory. Tried')",
        1,
        "-c: error: out of memory; take fewer bits",
    ),
    "a package": (
        "import no_such_package.part",
        2,
        "-c: error: the package no_such_package is missing; pip install -r requirements.txt",
    ),
}


@pytest.mark.parametrize(("body", "status", "words"), ENDINGS.values(), ids=ENDINGS)
def test_how_a_run_ends(body, status, words):
    done = run_main(body)
    assert done.returncode == status
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == (1 if words else 0)
    assert done.stdout == ("done\n" if "print" in body else "")


@pytest.mark.parametrize("body", ["raise RuntimeError('a bug')", "1 / 0", "import qllm.no_such"])
def test_what_is_our_own_mistake_has_a_traceback(body):
    done = run_main(body)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_second_interrupt_does_not_disturb_the_first():
    """Impatient users press Ctrl-C twice, also while Python exits."""
    body = "import atexit, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    done = run_main(body + "raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "-c: interrupted\n")


def test_long_values_lose_their_middle():
    line = console.one_line(f"config.json: {'x' * 100_000} cannot be; give 3")
    assert len(line) < 1300
    assert line.startswith("config.json: xxx") and line.endswith("xxx cannot be; give 3")


def test_a_terminal_shows_what_it_would_obey():
    """Model output may hold escape sequences; a pipe gets them as they are."""
    text = "\x1b]0;title\x07\x9b1m \u00e9\tend\n"
    main, side = pty.openpty()
    done = run_main(f"print({text!r}, end='')", stdout=side, stderr=side, capture_output=False)
    os.close(side)
    found = os.read(main, 1000).decode()
    os.close(main)
    assert (done.returncode, found) == (
        0,
        "\\u001b]0;title\\u0007\\u009b1m \u00e9\tend\r\n",
    )
    assert run_main(f"print({text!r}, end='')", encoding="utf-8").stdout == text


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_script_without_a_standard_stream(number, tmp_path):
    """No traceback, and no file of the run's in the stream's place."""
    body = "stream = [sys.stdin, sys.stdout, sys.stderr]\nfor s in stream: s.fileno()\n"
    body += f"if {number}: print('x', file=stream[{number}], flush=True)\n"
    body += "else: assert stream[0].buffer.read() == b''\n"
    body += f"assert os.readlink('/proc/self/fd/{number}') == '/dev/null'"
    done = run_main(body, preexec_fn=lambda: os.close(number))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_output_that_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        done = run_main("print('text')", stdout=full, stderr=-1, capture_output=False)
    assert (done.returncode, done.stderr) == (
        2,
        "-c: error: standard output cannot be written (No space left on device)\n",
    )


INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == "qllm.cli":
            os.kill(os.getpid(), int(number))
number, script = sys.argv[1:]
sys.argv = [script]
sys.meta_path.insert(0, Interrupting())
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_a_signal_during_the_first_imports(script):
    number = signal.SIGTERM if script.startswith("qllm") else signal.SIGINT
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT, str(number.value), script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + number
    assert done.stderr == f"{script}: {console.SIGNALS[number]}\n"


def test_a_signal_while_a_file_is_written(tmp_path):
    """Nothing is left behind, though a second signal comes while it is cleared away."""
    body = f"""
from itertools import product
from pathlib import Path
from qllm.checkpoint.writer import new_folder
with new_folder(Path({str(tmp_path / "out")!r})) as folder:
    import atexit, shutil
    remove = shutil.rmtree
    shutil.rmtree = lambda *a, **o: (os.kill(os.getpid(), signal.SIGINT), remove(*a, **o))
    (folder / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""
    done = processes.run(["-c", script_of(body)], os.environ, cwd=ROOT)  # which has torch
    assert (done.returncode, done.stderr) == (143, "-c: terminated\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lines", [10, 100_000])
def test_a_reader_that_leaves(lines):
    """`| head -1`: no complaint, whether the pipe breaks in the middle or at the end."""
    code = f"from qllm import cli\ncli.run(lambda: [print('line') for _ in range({lines})] and 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 141


def test_a_script_with_nobody_to_read():
    done = run_main("print('text')", preexec_fn=lambda: os.close(1), capture_output=False)
    assert done.returncode == 0


def test_text_that_the_terminal_lacks():
    """A character that cannot be printed is escaped; the run is not lost."""
    done = run_main("print('\u2019t \U0001f600')", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "\\u2019t \\U0001f600\n")


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


# A script as a process that says when it has started; before that Ctrl-C is Python's own.
STARTED = """
import runpy, sys
from qllm import cli
from qllm.cli import console
sys.argv = sys.argv[1:]
print("started", flush=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


DELAYS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9, 1.1, 1.5)
BOTH = ("qllm_gen.py", "ref_gen.py")


@pytest.mark.parametrize(
    ("script", "delay"),
    slow_but([*product(BOTH[:1], (0.1, 0.3, 0.6, 1.1)), (BOTH[1], 0.9)], BOTH, DELAYS),
)
def test_ctrl_c_at_any_time(script, delay):
    """130 and one line, whether torch is being imported or a model run; SIGTERM is no other."""
    command = [sys.executable, "-c", STARTED, script, "--model-size", "tiny"]
    process = subprocess.Popen(
        # BLOOM knows no longest text: this one goes on for long after the last delay.
        [*command, "--model-name", "bloom", "--max-gen-tokens", "20000", "--prompt", "He is"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(delay)
    number = signal.SIGTERM if delay in (0.2, 0.4, 0.6, 0.9) else signal.SIGINT
    process.send_signal(number)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 128 + number, (error, out)
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert lines == [f"{script}: {console.SIGNALS[number]}"]


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


def parsed(script: str, monkeypatch, *args: str):
    module = __import__(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *args])
    return module.parse_args()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults(script, monkeypatch):
    found = vars(parsed(script, monkeypatch, *SCRIPTS[script]))
    common = DEFAULTS.keys() & found.keys()
    assert {key: found[key] for key in common} == {key: DEFAULTS[key] for key in common}
    assert len(common) >= 2
    if script == "qllm_gen.py":
        assert common == DEFAULTS.keys()


def test_prompts_come_from_everywhere_in_order(tmp_path, monkeypatch):
    path = tmp_path / "prompts"
    path.write_bytes("\ufefffrom a file\r\n\n  \nünd again\n".encode())
    options = ("--prompt", "one", "--prompt", "two\nlines", "--prompt-file", str(path))
    args = parsed("qllm_gen.py", monkeypatch, *options)
    assert cli.read_prompts(args) == ["one", "two\nlines", "from a file", "ünd again"]
    path = path.rename(tmp_path / "prompts.jsonl")
    path.write_text('{"prompt": "a\\nb", "text": "no"}\r\n\n{"text": "c"}', encoding="utf-8")
    args = parsed("qllm_gen.py", monkeypatch, "--prompt-file", str(path))
    assert cli.read_prompts(args) == ["a\nb", "c"]
    path.write_text('{"prompts": "a"}')
    with pytest.raises(UserError, match=r'jsonl: each line .* is \{"prompt": "…"\}; line 1 is not'):
        cli.read_prompts(args)


def test_standard_input_is_read_as_a_file_is(monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--stdin")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo")))
    assert cli.read_prompts(args) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntw\xe9")))
    with pytest.raises(UserError, match="standard input is not UTF-8 text: line 2 has the byte"):
        cli.read_prompts(args)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="--stdin: standard input is closed"):
        cli.read_prompts(args)


def test_a_prompt_with_a_token_that_the_model_does_not_have(capsys):
    """What a prompt loses with its beginning does not count."""
    tokenizer = Tokenizer.load(tiny("opt"), 4000)
    with pytest.raises(UserError, match="prompt 2: the text becomes token 4095, "):
        cli.tokenize(tokenizer, ["a", "a" + tokenizer.decode([4095])], 20)
    cli.tokenize(tokenizer, [tokenizer.decode([4095]) + " the end"], 2)


def test_the_default_prompts(monkeypatch):
    expected = ["He is working on", "He has a", "Everyone is happy and I can"]
    assert cli.read_prompts(parsed("qllm_gen.py", monkeypatch)) == expected


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "\udcff"])
def test_prompts_that_are_none(prompt, monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--prompt", "good", "--prompt", prompt)
    with pytest.raises(UserError, match="prompt 2 is"):
        cli.read_prompts(args)


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_a_long_prompt_loses_its_beginning_with_a_note(family, capsys):
    tokenizer = Tokenizer.load(tiny(family))
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    (whole,) = cli.tokenize(tokenizer, [text], 1000)
    assert capsys.readouterr().err == ""
    for limit in (len(whole) - 1, 5, 2, 1):
        (cut,) = cli.tokenize(tokenizer, [text], limit)
        assert len(cut) == limit
        special = sum(a == b for a, b in zip(cut, whole, strict=False) if a < 4)
        assert cut[special:] == whole[len(whole) - limit + special :]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("note: prompt ")
        assert f"{len(whole)} tokens" in lines[0]
        assert f"--max-prompt-length is {limit}" in lines[0]


@pytest.mark.parametrize(
    ("text", "words"), [("0", "too small"), ("-3", "too small"), ("1.5", "not"), ("many", "not")]
)
def test_whole_numbers(text, words):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match=words):
        cli.whole_number(1)(text)


def test_a_model_is_named_once(monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--model-path", "x", "--model-size", "tiny")
    with pytest.raises(UserError, match="name two models"):
        cli.resolve_model(args)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "meta", "", "cuda:99"])
def test_devices_that_are_not_there(device, monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--device", device)
    with pytest.raises(UserError, match="--device"):
        cli.resolve_device(args)


@pytest.mark.parametrize("done", [0, 25])
def test_progress_where_there_is_no_terminal(done, monkeypatch):
    """A line at least every so often, though what is counted takes longer; with what is left."""
    said: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(bars, "NOTE_SECONDS", 0.001)
    monkeypatch.setattr(bars, "note", said.put)
    ticks = iter([100.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(ticks, 200.0))
    with cli.meter("quantizing")(1_000_000_000, done * 10_000_000) as add:
        assert said.get(timeout=10) == f"quantizing: {done * 10} of 1000 MB"
        add(100_000_000)
        for line in iter(lambda: said.get(timeout=10), None):
            if line.endswith("left"):
                break
    minutes = {0: 100 * 9 / 60, 25: 100 * 6.5 / 60}[done]
    assert line == f"quantizing: {done * 10 + 100} of 1000 MB, about {minutes:.0f} min left"
    count = threading.active_count()
    assert list(cli.progress("measuring")([1, 2])) == [1, 2]
    assert threading.active_count() == count  # whoever speaks ends with the work


def test_progress_passes_items_on_as_they_are_worked_through(capsys):
    done = []
    for item in cli.progress("loading")([1, 2, 3]):
        assert len(done) == item - 1
        done.append(item)
    assert done == [1, 2, 3]
    assert capsys.readouterr().err == ""


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
