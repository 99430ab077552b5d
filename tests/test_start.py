"""What a script does first."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

from qllm import start

BLOCK = """
if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent))  # which python -P leaves out
    from qllm.start import begin

    begin()
"""


def test_a_python_that_is_too_old_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    monkeypatch.setattr(sys, "argv", ["/home/me/qllm_gen.py", "--help"])
    with pytest.raises(SystemExit) as end:
        start.begin()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "qllm_gen.py: error: QLLM takes Python 3.11 or later, not 3.10"


def test_every_script_begins_like_that():
    for script in ROOT.glob("*.py"):
        text = script.read_text(encoding="utf-8")
        before, found, _ = text.partition(BLOCK)
        assert found and "import" not in before.replace("from __future__ import annotations", "")


ENDING = """
from qllm.start import begin

begin()

import atexit, threading, time

from qllm import cli
from qllm.errors import UserError

class Last:
    def __del__(self):
        print("taken apart")

def later():
    time.sleep(0.1)
    print("thread")

def main():
    global last
    last = Last()
    print("main")
    atexit.register(print, "atexit")
    threading.Thread(target=later).start()
    {last}

cli.run(main)
"""


@pytest.mark.parametrize(
    ("last", "status", "printed"),
    [
        ("return 3", 3, ["main", "thread", "atexit"]),
        ("raise UserError('no')", 2, ["main", "thread", "atexit"]),
        ("raise ValueError", 1, ["main", "thread", "atexit", "taken apart"]),
    ],
)
def test_a_script_ends_when_all_is_done_and_written(last, status, printed):
    """Threads and what was registered come before; Python's own ending only behind a fault."""
    command = [sys.executable, "-c", ENDING.replace("{last}", last)]
    end = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (end.returncode, end.stdout.split("\n")[:-1]) == (status, printed)
