"""A short run of tools.fuzz; a long one is `python3 -m tools.fuzz --number 100000`."""

from __future__ import annotations

import pytest

from tools import fuzz, tiny_checkpoints


@pytest.fixture(scope="module")
def bases():
    return tiny_checkpoints.checkpoints()


def test_whole_checkpoints_are_loaded(bases, tmp_path):
    """Else every load would be refused, and show nothing."""
    for number, (name, files) in enumerate(bases.items()):
        folder = tmp_path / str(number)
        fuzz.write(folder, files)
        fuzz.load(folder)
        assert name


@pytest.mark.usefixtures("one_thread")
def test_no_load_breaks(bases, capsys):
    result = fuzz.fuzz(bases, seed=0, numbers=range(50))
    assert not result.faults, capsys.readouterr().out
    assert result.loaded > 5
    assert result.refused > 25


def test_a_fault_is_told_with_its_number(bases, monkeypatch, capsys):
    def break_down(folder):
        raise ZeroDivisionError("nothing is divided")

    monkeypatch.setattr(fuzz, "load", break_down)
    result = fuzz.fuzz(bases, seed=0, numbers=range(3, 5))
    assert dict(result.counts) == {"ZeroDivisionError in test_fuzz.py:break_down": 2}
    assert "load 3 of seed 0: " in capsys.readouterr().out
