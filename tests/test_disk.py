"""What a disk refuses to take: one line that names the place, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny

from qllm import folders
from qllm.checkpoint.convert import convert
from qllm.checkpoint.reader import read_raw_config
from qllm.checkpoint.writer import new_file, new_folder
from qllm.config import QuantPlan
from qllm.errors import UserError, WritingError
from qllm.evaluate import plots
from qllm.hub import ModelFolder
from qllm.models import read_config
from qllm.onnx.export import export
from qllm.quantize_model import quantize
from qllm.quantizer import output
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.random_model import calibrate_random

SOURCE = tiny("opt")
LIMIT = 10_000  # bytes of a file


def write_calibration(target: Path) -> None:
    found = calibrate_random(read_config(read_raw_config(SOURCE)), 1, 2, 0)
    with new_file(target) as temporary:
        found.save(temporary)


def write_plot(target: Path) -> None:
    pytest.importorskip("matplotlib")
    row = {"model": "opt", "bitwidth": "16", "format": "16 bits", "algorithm": "", "bytes": 1}
    result = {
        "rows": [{**row, "perplexity": {"gptq": 2.0}, "perplexity_error": {}, "agreement": None}],
        **{"model": "opt", "models": ["opt"], "dataset": None, "conventions": ["gptq"]},
        **{"tasks": [], "device": "cpu", "machine": {"cpu": "Z80", "threads": 1}, "date": "today"},
    }
    plots.save(result, target.with_suffix(".png"))


WRITERS = {
    "a converted checkpoint": lambda target: convert(
        ModelFolder(SOURCE, "opt"), target, overwrite=False
    ),
    "a quantized one": lambda target: quantize_checkpoint(
        Job(SOURCE, QuantPlan.parse("4")), target
    ),
    "an ONNX model": lambda target: export(SOURCE, target),
    "statistics": write_calibration,
    "pictures": write_plot,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_disk_that_takes_no_more(write, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = str(caught.value)
    assert str(tmp_path) in line and "File too large" in line and "name another place" in line
    # What was finished of a quantized checkpoint waits for the same command.
    assert {path.name for path in tmp_path.iterdir()} <= {"out.partial"}


@pytest.mark.parametrize("write", [new_file, new_folder])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_written_to(write, number, tmp_path, monkeypatch):
    def refuse(path: Path, *args, **options) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(WritingError) as caught, write(tmp_path / "deep" / "out"):
        pass
    line = str(caught.value)
    assert line.startswith(f"{tmp_path / 'deep'} cannot be written ({os.strerror(number)}); ")
    assert ("GB are free there; free some" in line) == (number == errno.ENOSPC)


@pytest.mark.parametrize(
    ("write", "make"), [(new_file, "mkstemp"), (new_folder, "mkdtemp")], ids=["file", "folder"]
)
def test_the_name_that_was_given_is_named(write, make, tmp_path, monkeypatch):
    def refuse(dir, prefix):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir / f"{prefix}abc"))

    monkeypatch.setattr(tempfile, make, refuse)
    with pytest.raises(WritingError) as caught, write(tmp_path / "out"):
        pass
    assert str(caught.value).startswith(f"{tmp_path / 'out'} cannot be written")


def test_errors_of_reading_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "none").read_bytes()
    with pytest.raises(PermissionError), new_file(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "no", "a source")


def test_a_disk_that_is_full_behind_the_weights(tmp_path, monkeypatch):
    def refuse(source: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output, "copy_small_files", refuse)
    with pytest.raises(WritingError, match=r"out\.partial/model cannot be written \(No space"):
        quantize_checkpoint(Job(SOURCE, QuantPlan.parse("4")), tmp_path / "out")
    monkeypatch.undo()
    quantize_checkpoint(Job(SOURCE, QuantPlan.parse("4")), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_room_is_found_out_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**7))
    line = r"out takes 0.01 GB and 0.01 GB are free there; free some, or name another place"
    with pytest.raises(WritingError, match=line):
        convert(ModelFolder(SOURCE, "opt"), tmp_path / "out", overwrite=False)
    assert folders.free_bytes(tmp_path / "deep" / "out") == 10**7
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_said_to_be_kept_where_nothing_could_be():
    notes: list[str] = []
    with pytest.raises(WritingError, match=r"/proc/out\.partial cannot be written"):
        quantize("opt-tiny", save="/proc/out", note=notes.append)
    assert notes == []
