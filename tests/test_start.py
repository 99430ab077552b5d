"""What a script does first."""

from __future__ import annotations

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
