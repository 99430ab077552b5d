"""What is temporary: gone when it is done with, and what killed processes left of it goes, too."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qllm.checkpoint.writer import new_file, new_folder
from qllm.temporary import scratch_folder

HERE, ELSEWHERE = platform.node(), "another.host"
MAKERS = {"file": new_file, "folder": new_folder}


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def left(folder: Path, kind: str, host: str, process: int, age: float) -> Path:
    """What a process left of `out`."""
    path = folder / f".out.{host}.{process}.abc_1234"
    if kind == "folder":
        path.mkdir()
        (path / "half").touch()
        os.utime(path / "half", (time.time() - age,) * 2)
    else:
        path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


# Host, whether its process runs, hours since it changed, and whether a process has locked it.
CASES = {
    "killed": ((HERE, False, 0, False), False),
    "of another container of this name": ((HERE, False, 100, True), True),
    "at work": ((HERE, True, 0, True), True),
    "begun just now": ((HERE, True, 0, False), True),
    "killed, the number is another process's": ((HERE, True, 1, False), False),
    "at work elsewhere": ((ELSEWHERE, False, 23, False), True),
    "killed elsewhere": ((ELSEWHERE, False, 25, False), False),
    "at work elsewhere, locked": ((ELSEWHERE, False, 25, True), True),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("case", CASES)
def test_what_a_process_left_is_removed_by_the_next_one(case, kind, dead, tmp_path):
    (host, runs, hours, locked), stays = CASES[case]
    path = left(tmp_path, kind, host, os.getppid() if runs else dead, hours * 3600)
    others = [tmp_path / name for name in (".out.txt", ".out", f".other.{HERE}.{dead}.abc_1234")]
    for other in others:
        other.touch()
    lock = os.open(path, os.O_RDONLY)
    try:
        if locked:
            fcntl.flock(lock, fcntl.LOCK_EX)
        with MAKERS[kind](tmp_path / "out"):
            pass
    finally:
        os.close(lock)
    assert path.exists() == stays
    assert all(other.exists() for other in others)


@pytest.mark.parametrize("runs", [False, True])
def test_without_locks_the_number_of_a_process_decides(runs, dead, tmp_path, monkeypatch):
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = left(tmp_path, "folder", HERE, os.getppid() if runs else dead, 1e6)
    with new_folder(tmp_path / "out"):
        pass
    assert path.exists() == runs


# What runs behind a shell's `&`, and so may all tests, ignores SIGINT.
KILLED = """
import signal, time
from qllm.temporary import scratch_folder
signal.signal(signal.SIGINT, signal.default_int_handler)
with scratch_folder("test") as folder:
    (folder / "large").touch()
    print(folder, flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_folder_for_what_is_not_kept(number, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [sys.executable, "-c", KILLED]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    theirs = Path(process.stdout.readline().decode().strip())
    assert theirs.parent == tmp_path
    with scratch_folder("test") as ours:
        assert theirs.exists() and ours.exists()
        process.send_signal(number)
        process.communicate(timeout=60)
    assert theirs.exists() == (number == signal.SIGKILL)
    with scratch_folder("test"):
        assert not theirs.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", MAKERS)
def test_a_long_name(kind, tmp_path):
    target = tmp_path / ("é" * 100 + "x" * 55)  # as long as file systems take
    with MAKERS[kind](target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list what nobody may")
def test_a_folder_that_may_not_be_listed(tmp_path):
    place = tmp_path / "box"
    place.mkdir(0o300)
    with new_file(place / "out") as temporary:
        temporary.write_text("new")
    place.chmod(0o700)
    assert (place / "out").read_text() == "new"
    shutil.rmtree(place)
