"""A short run of tools.fuzz; a long one is `python3 -m tools.fuzz --number 100000`."""

from __future__ import annotations

import pytest

from tools import fuzz, tiny_checkpoints


@pytest.fixture(scope="module")
def bases():
    return tiny_checkpoints.checkpoints()


@pytest.mark.usefixtures("one_thread")
def test_no_load_breaks(bases, capsys):
    result = fuzz.fuzz(bases, seed=0, numbers=range(24))
    assert not result.faults, capsys.readouterr().out
    assert result.ended["loaded"]
    assert result.ended["refused"] > 12


def test_a_fault_is_told_with_its_number(bases, monkeypatch, capsys, tmp_path):
    def break_down(folder):
        raise ZeroDivisionError("nothing is divided")

    monkeypatch.setattr(fuzz, "load", break_down)
    base = {"0": bases["llama gptq"]}
    with pytest.raises(ZeroDivisionError):  # a whole one has to be loaded
        fuzz.fuzz(base, seed=0, numbers=range(3, 5))
    monkeypatch.setattr(fuzz, "load", lambda folder: folder.name == "0" or break_down(folder))
    result = fuzz.fuzz(base, seed=0, numbers=range(3, 5), save=tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["0-3"]
    assert dict(result.counts) == {"ZeroDivisionError in test_fuzz.py:break_down": 2}
    assert "load 3 of seed 0: " in capsys.readouterr().out
