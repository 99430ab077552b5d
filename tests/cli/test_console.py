"""How a run ends: mistakes, Ctrl-C, a closed pipe, streams that are not there."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import processes
import pytest
from conftest import ROOT
from covering import slow_but

from qllm.cli import console


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
        "from qllm.errors import UserError\nraise UserError('four\\nfive  `dtype` `x`')",
        2,
        "-c: error: four five --dtype `x`\n",
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
    "memory": (
        "raise MemoryError",
        1,
        "-c: error: out of memory; take fewer bits or a smaller model\n",
    ),
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


def test_standard_input_that_is_no_text_is_left_to_its_reader():
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as most locales have it
    body = r"assert list(sys.stdin) == ['a\n', '\udcff\n', 'b\n']"
    done = run_main(body, input=b"a\n\xff\nb\n", text=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


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
    slow_but([*product(BOTH[:1], (0.3, 1.1)), (BOTH[1], 0.9)], BOTH, DELAYS),
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


@pytest.mark.parametrize(
    ("encoding", "escaped"), [("ascii", True), ("latin-1", True), ("UTF8", False)]
)
def test_json_is_json_whatever_the_terminal_takes(encoding, escaped, monkeypatch):
    output = io.BytesIO()
    stream = io.TextIOWrapper(output, encoding, errors="backslashreplace", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    console.print_json({"text": "ö日🦊"})
    assert json.loads(output.getvalue().decode(encoding)) == {"text": "ö日🦊"}
    assert (b"\\u" in output.getvalue()) == escaped
