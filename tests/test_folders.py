"""Where QLLM keeps things: what the environment says, machines without a home, other users."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from qllm import folders
from qllm.errors import UserError


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path) -> Path:
    """A home, a folder for temporary files, and no variable of ours."""
    for name in (folders.HOME, folders.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place() -> tuple[Path, list[str]]:
    notes: list[str] = []
    return folders.home_path("a/b", notes.append), notes


@pytest.mark.parametrize("variable", [folders.HOME, folders.CACHE])
def test_what_the_environment_says(variable, monkeypatch, machine):
    last = machine / "tmp" / f"qllm-{os.geteuid()}"
    assert folders.search_path(variable) == [machine / "home/.cache/qllm", last]
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folders.search_path(variable) == [Path("/x/qllm"), last]
    for given, found in (("/a/b", "/a/b"), ("~/b", machine / "home/b"), ("b", machine / "b")):
        monkeypatch.setenv(variable, given)
        assert folders.search_path(variable) == [Path(found)]
    monkeypatch.setenv(variable, "~no_such_user_here/b")
    with pytest.raises(UserError, match=f"{variable}=~no_such_user_here/b: .*name a folder"):
        folders.search_path(variable)


def test_what_is_made_is_one_s_own(monkeypatch, machine):
    before = os.umask(0)
    try:
        assert place() == (machine / "home/.cache/qllm/a/b", [])
    finally:
        os.umask(before)
    for folder in (machine / "home", machine / "home/.cache", machine / "home/.cache/qllm"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def nobody(monkeypatch, machine) -> str:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return "no home directory"


def file_for_a_home(monkeypatch, machine) -> str:
    (machine / "home").touch()
    return "Not a directory"


def read_only_home(monkeypatch, machine) -> str:
    (machine / "home/.cache/qllm").mkdir(parents=True)
    access = os.access
    own = str(machine / "home")
    monkeypatch.setattr(
        os, "access", lambda path, mode: own not in str(path) and access(path, mode)
    )
    return "Permission denied"


@pytest.mark.parametrize("case", [nobody, file_for_a_home, read_only_home])
def test_a_machine_without_a_folder_of_one_s_own(case, monkeypatch, machine):
    words = case(monkeypatch, machine)
    path, (line,) = place()
    folder = machine / "tmp" / f"qllm-{os.geteuid()}"
    assert path == folder / "a/b"
    assert words in line and "set QLLM_HOME" in line and str(folder) in line
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    path.parent.mkdir()
    path.touch()
    assert folders.find("a/b") == path

    folder.chmod(0o777)  # anybody may have put it there
    assert folders.find("a/b") is None
    said = r"others may change .*qllm-\d+: .* mode 777\); "
    with pytest.raises(UserError, match=f"{said}set QLLM_HOME to one"):
        place()
    with pytest.raises(UserError, match=f"{said}name one with --save, or set QLLM_HOME"):
        folders.home_path("a/b", print, "--save")


@pytest.mark.parametrize(
    ("mode", "safe"), [(0o755, True), (0o1777, True), (0o777, False), (0o757, False)]
)
@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_who_else_may_change_a_folder(mode, safe, below, machine):
    (machine / "cache/a/b").mkdir(parents=True)
    (machine / "cache").chmod(mode)
    (machine / "link").symlink_to(machine / "cache")
    folder = machine / "link" / below
    if safe:
        assert folders.check_private(folder) == machine / "cache" / below
    else:
        with pytest.raises(PermissionError, match=f"cache: owner {os.geteuid()}, mode {mode:o}"):
            folders.check_private(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_of_another_user(machine):
    (machine / "cache/a").mkdir(parents=True)
    os.chown(machine / "cache", 12345, -1)
    with pytest.raises(PermissionError, match="cache: owner 12345"):
        folders.check_private(machine / "cache/a")


@pytest.mark.parametrize(
    ("name", "members", "safe"),
    [("ann", [], True), ("ann", ["ann"], True), ("ann", ["ann", "bob"], False), ("all", [], False)],
)
def test_a_group_of_one_s_own(name, members, safe, monkeypatch):
    """As many systems give to each user, with a umask that lets it write."""
    group = SimpleNamespace(gr_gid=77, gr_name=name, gr_mem=members)
    monkeypatch.setattr(grp, "getgrgid", lambda number: group)
    user = SimpleNamespace(pw_gid=77, pw_name="ann")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: user)
    status = SimpleNamespace(st_uid=os.geteuid(), st_gid=77, st_mode=stat.S_IFDIR | 0o775)
    assert (folders.whose(status) is None) == safe


def test_root_outside_of_a_user_namespace_is_trusted_above(monkeypatch, machine):
    """There it is an unknown user, as all others are: above a folder, not as its owner."""
    folder = machine / "cache"
    folder.mkdir()
    monkeypatch.setattr(folders, "_unmapped", lambda: 65534)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    mine = {str(folder): 4321}
    found = Path.stat

    def owned(path: Path, **options) -> SimpleNamespace:
        status = found(path, **options)
        uid = mine.get(str(path), folders._unmapped())
        return SimpleNamespace(st_uid=uid, st_gid=0, st_mode=status.st_mode)

    monkeypatch.setattr(Path, "stat", owned)
    assert folders.check_private(folder) == folder
    mine.clear()
    with pytest.raises(PermissionError, match="owner 65534"):
        folders.check_private(folder)
