"""Progress: items passed on as they come, and lines where there is no terminal."""

from __future__ import annotations

import queue
import threading

import pytest

from qllm import cli
from qllm.cli import bars


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
