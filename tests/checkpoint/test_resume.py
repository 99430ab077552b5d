"""A folder that takes long to make: killed anywhere and gone on with, it has the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import Killed, contents, is_killed, killed_at

from qllm.checkpoint.resume import PartialFolder
from qllm.checkpoint.writer import ShardWriter
from qllm.errors import UserError

STEPS = 5
SETTINGS = {"bits": 4, "names": ["a", "b"], "none": None}


@pytest.fixture(autouse=True, scope="module")
def no_waiting():
    """The disk need not spin for a process that does not really die."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def run(target: Path, settings: dict | None = None) -> None:
    """Make a checkpoint of several shards, in steps that are committed."""
    partial = PartialFolder(target, settings or SETTINGS)
    if not partial.finished:
        state = partial.state
        writer = ShardWriter(
            partial.model, limit=3700, header_bytes=2000, state=state.get("shards")
        )
        for step in range(state.get("done", 0), STEPS):
            for name, size in (("a", 400), ("b", 100), ("c", 1)):
                writer.write(f"{step}.{name}", torch.full((size,), float(step)))
            (partial.folder / f"hidden-{step + 1}").write_text(str(step))
            partial.commit({"done": step + 1, "shards": writer.sync()})
        (partial.model / "config.json").write_text("{}")
        writer.finish()
    partial.finish()


def killed_run(target: Path, point: int) -> bool:
    return is_killed(lambda: run(target), point)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("undisturbed") / "out"
    run(target)
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert len(contents(target)) == 6  # shards, one of them begun in two steps; index, config.json
    return contents(target)


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> int:
    """How many places there are to be killed at."""
    target = tmp_path_factory.mktemp("points") / "out"
    with killed_at(1000) as came:
        run(target)
    assert {"write", "fsync", "rename", "replace", "mkdir", "rmdir"} <= set(came)
    assert len(came) > 50
    return len(came)


def assert_whole(target: Path, expected: dict[str, bytes]) -> None:
    assert contents(target) == expected
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_killed_anywhere(undisturbed, points, there, tmp_path):
    for point in range(points):
        target = tmp_path / str(point) / "out"
        target.parent.mkdir()
        if there:
            target.mkdir()  # an empty folder may be there
        assert killed_run(target, point)
        # The target is whole, or it is not there.
        if target.exists() and any(target.iterdir()):
            assert contents(target) == undisturbed
        if point == points - 1:  # nothing but an empty folder is left beside it, which goes
            assert "is there already" in refusal(target)
        else:
            run(target)
        assert_whole(target, undisturbed)
        shutil.rmtree(target.parent)


def test_killed_over_and_over(undisturbed, points, tmp_path):
    draw = random.Random(0)
    for attempt in range(20):
        target = tmp_path / str(attempt) / "out"
        target.parent.mkdir()
        partial, kills = target.with_name("out.partial"), 0
        while killed_run(target, draw.randrange(points // 2)):
            kills += 1
            if partial.exists() and not any(partial.iterdir()):
                partial.rmdir()
                break
        assert_whole(target, undisturbed)
        assert kills


def refusal(target: Path, settings: dict | None = None) -> str:
    """What a run says that cannot work."""
    with pytest.raises(UserError) as error:
        run(target, settings)
    return str(error.value)  # which, by its traceback, holds on to all that the run had


def interrupted(target: Path, steps: int = 2) -> Path:
    """A run that was killed when it had committed some steps, and where it left what it had."""
    whole = PartialFolder.commit

    def commit(self, state):
        whole(self, state)
        if state.get("done") == steps:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialFolder, "commit", commit)
        try:
            run(target)
        except Killed:
            return target.parent / "out.partial"
    raise AssertionError


def test_work_that_was_done_is_not_done_again(tmp_path):
    interrupted(tmp_path / "out", 3)
    with killed_at(1000) as came:
        run(tmp_path / "out")
    assert came.count("write") == (STEPS - 3) * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, ("bits 4", "this one has 3")),
        ({"names": ["a"]}, ('names ["a", "b"]', 'this one has ["a"]')),
        ({"more": 1}, ("more null", "this one has 1")),
        ({"none": "x" * 1000}, ("none null", "xxx…")),
    ],
)
def test_other_settings_are_refused_and_change_nothing(change, words, undisturbed, tmp_path):
    folder = interrupted(tmp_path / "out")
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    line = refusal(tmp_path / "out", {**SETTINGS, **change})
    assert "\n" not in line and len(line) < 500
    for word in (str(folder), "interrupted run", *words):
        assert word in line
    assert all(path.read_bytes() == data for path, data in files.items())
    run(tmp_path / "out")
    assert_whole(tmp_path / "out", undisturbed)


def test_settings_are_what_json_makes_of_them(undisturbed, tmp_path):
    interrupted(tmp_path / "out")
    run(tmp_path / "out", {**SETTINGS, "names": ("a", "b")})
    assert_whole(tmp_path / "out", undisturbed)


def test_a_setting_that_is_missing_is_another_one(tmp_path):
    interrupted(tmp_path / "out")
    settings = {key: SETTINGS[key] for key in ("names", "none")}
    assert "bits 4, this one has null" in refusal(tmp_path / "out", settings)


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_write_one_folder(undisturbed, tmp_path):
    folder = interrupted(tmp_path / "out")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    line = refusal(tmp_path / "out")
    assert line == f"another process is writing {tmp_path / 'out'} now"
    other.communicate("")
    run(tmp_path / "out")
    assert_whole(tmp_path / "out", undisturbed)


def test_a_run_that_is_refused_lets_go_of_the_lock(undisturbed, tmp_path):
    """Even while its error, which remembers all of it, is held."""
    interrupted(tmp_path / "out")
    with pytest.raises(UserError, match="interrupted run") as error:
        run(tmp_path / "out", {**SETTINGS, "bits": 3})
    run(tmp_path / "out")
    assert_whole(tmp_path / "out", undisturbed)
    assert "bits" in str(error.value)


def test_a_run_holds_the_lock_from_the_first(tmp_path):
    first = PartialFolder(tmp_path / "out", SETTINGS)
    assert "another process" in refusal(tmp_path / "out")
    del first
    assert PartialFolder(tmp_path / "out", SETTINGS).state == {}


@pytest.mark.parametrize(
    "journal",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b'{"settings": {}}',
        b'{"state": {}}',
        b'{"settings": 3, "state": {}}',
        b'{"settings": {"bits": 4, "names": ["a", "b"], "none": null}, "state": 3}',
    ],
)
def test_a_journal_that_is_none(journal, tmp_path):
    folder = interrupted(tmp_path / "out")
    (folder / "journal.json").write_bytes(journal)
    line = refusal(tmp_path / "out")
    assert "journal.json cannot be read" in line and f"remove {folder}" in line
    assert (folder / "model").exists()


def test_a_target_that_is_there(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").touch()
    assert "is there already and not empty; name another folder" in refusal(target)
    # It came while a run was at work.
    shutil.rmtree(target)
    interrupted(target)
    target.mkdir()
    (target / "mine").touch()
    assert "is there already and not empty" in refusal(target)
    assert contents(target) == {"mine": b""}


def test_a_target_that_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    assert "is a file; name a folder" in refusal(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_that_was_removed_is_made_anew(undisturbed, points, tmp_path):
    """Behind a run that was killed while it cleared away."""
    target = tmp_path / "out"
    for point in range(points - 1, 0, -1):
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        assert killed_run(target, point)
        if not target.exists():
            break
        shutil.rmtree(target)
        run(target)
        assert_whole(target, undisturbed)


def test_folders_above_it_are_made(undisturbed, tmp_path):
    run(tmp_path / "deep" / "er" / "out")
    assert_whole(tmp_path / "deep" / "er" / "out", undisturbed)


def test_a_name_with_a_dot_keeps_it(tmp_path):
    partial = PartialFolder(tmp_path / "llama-3.2", SETTINGS)
    assert partial.folder == tmp_path / "llama-3.2.partial"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, undisturbed, tmp_path, monkeypatch):
    """As Lustre and NFS may be: a file says who writes, unless that process is dead."""

    def refuse(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = interrupted(tmp_path / "out")
    dead = subprocess.Popen(["true"])
    dead.wait()
    (folder / f"running-{platform.node()}-{dead.pid}").touch()
    for other in (f"{platform.node()}-{os.getppid()}", "another-host-1"):
        mark = folder / f"running-{other}"
        mark.touch()
        host, _, process = other.rpartition("-")
        assert refusal(tmp_path / "out") == (
            f"another process is writing {tmp_path / 'out'} now, {process} on {host}; if that has "
            f"ended, remove {mark}"
        )
        mark.unlink()
    run(tmp_path / "out")
    assert_whole(tmp_path / "out", undisturbed)
