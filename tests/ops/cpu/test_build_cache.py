"""The cache of compiled kernels: kept, damaged, others', and by several processes."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from building import (
    HANG_ONCE,
    MARKS,
    SEVEN,
    compiler_script,
    forked,
    is_gone,
    libraries,
    lines,
    load,
    output,
    python,
    refusal,
    temporary_folders,
    until,
    wait_for,
)

from qllm.ops.cpu import build

pytestmark = MARKS

# The cache.


def test_a_library_is_compiled_once(monkeypatch, source, tmp_path, own_cache, seven, capsys):
    work = compiler_script(tmp_path, monkeypatch, seven, 'echo "$unit" >> "$work/log"')
    monkeypatch.setenv("QLLM_CACHE", str(own_cache / "deep"))
    for _ in range(2):
        assert load(source).seven() == 7
    assert lines(work / "log") == ["a.cpp", "library.so"]
    assert (own_cache / "deep").stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in sorted((own_cache / "deep").iterdir())] == [".so", ".lock"]
    captured = capsys.readouterr()
    first, last = captured.err.splitlines()
    assert first == "note: compiling the CPU kernels (once, about 20 s) ..."
    assert re.fullmatch(r"note: the CPU kernels are compiled, in \d+ s", last)
    assert captured.out == ""
    assert build.load(source) is build.load(source)


def test_what_changes_a_library_changes_its_name(monkeypatch, source, tmp_path):
    known = {build._recipe(source).key}

    def assert_new() -> None:
        key = build._recipe(source).key
        assert len(key) == 16 and key not in known
        known.add(key)

    (source / "a.cpp").write_text(SEVEN + "\n")
    assert_new()
    (source / "a.h").touch()
    assert_new()
    (source / "a.h").write_text("\n")
    assert_new()
    (source / "a.h").rename(source / "b.h")
    assert_new()
    (source / "a.cpp").rename(source / "b.cpp")
    assert_new()
    monkeypatch.setitem(build.FLAGS, "b", ("-g",))
    assert_new()
    for name in ("COMMON", "LINK"):
        monkeypatch.setattr(build, name, (*getattr(build, name), "-g"))
        assert_new()
    monkeypatch.setenv("QLLM_CXXFLAGS", "-O1")
    assert_new()
    monkeypatch.setenv("CXX", f"{tmp_path / 'cxx'} -O1")
    assert_new()
    script = (tmp_path / "cxx").read_text()
    (tmp_path / "cxx").write_text(script.replace("--version) ", "--version) echo 99;"))
    assert_new()
    (tmp_path / "cxx").rename(tmp_path / "other")
    (tmp_path / "cxx").symlink_to(tmp_path / "other")
    assert_new()
    recipe = build._recipe(source)
    assert replace(recipe, machine="other").key not in known

    (source / "notes.txt").touch()
    assert build._recipe(source) == recipe


def test_a_source_that_is_edited_meanwhile_waits_for_its_turn(monkeypatch, source, tmp_path):
    script = (tmp_path / "cxx").read_text()
    edits = f"--version) echo new > '{source}/a.cpp';"  # after it was read for the hash
    (tmp_path / "cxx").write_text(script.replace("--version)", edits))
    keep = f'test "$unit" != a.cpp || cp a.cpp "{tmp_path}/compiled"\n'
    (tmp_path / "cxx").write_text(
        (tmp_path / "cxx").read_text().replace("for last", keep + "for last")
    )
    load(source)
    assert (source / "a.cpp").read_text() == "new\n"
    assert (tmp_path / "compiled").read_text() == SEVEN


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "cut short": content[: len(content) // 2],
        "overwritten": content[:64] + bytes(len(content[64:])),
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_library_is_made_anew(monkeypatch, source, tmp_path, kind, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, 'echo "$unit" >> "$work/log"')
    load(source)
    (library,) = libraries()
    # In a folder of its own: this process has the first one in use.
    monkeypatch.setenv("QLLM_CACHE", str(tmp_path / "second"))
    (tmp_path / "second").mkdir()
    copy = tmp_path / "second" / library.name
    copy.write_bytes(damaged(library.read_bytes())[kind])
    copy.chmod(0o755)
    for _ in range(2):
        assert load(source).seven() == 7
    assert lines(work / "log") == ["a.cpp", "library.so"] * 2


def test_a_library_that_never_loads_is_made_once(monkeypatch, source, tmp_path, seven):
    seven = tmp_path / "seven.so"
    seven.write_bytes(b"none")
    work = compiler_script(tmp_path, monkeypatch, seven, 'echo "$unit" >> "$work/log"')
    for _ in range(2):
        assert "do not load" in refusal(source)
    assert lines(work / "log") == ["a.cpp", "library.so"]


def test_what_is_loaded_is_what_was_checked(monkeypatch, source, tmp_path):
    """Even if another library takes its place as soon as it was read."""
    load(source)
    (library,) = libraries()
    content, make = library.read_bytes(), os.memfd_create

    def swapped(name: str) -> int:
        (tmp_path / "other").write_bytes(b"somebody else's")
        (tmp_path / "other").replace(library)
        return make(name)

    monkeypatch.setattr(os, "memfd_create", swapped)
    loaded = load(source)
    assert (loaded.seven(), library.read_bytes()) == (7, b"somebody else's")
    assert Path(loaded._name).read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["library", "cache"])
def test_what_another_user_owns_is_not_loaded(source, own_cache, what):
    load(source)
    os.chown(libraries()[0] if what == "library" else own_cache, 12345, -1)
    assert "owner 12345" in refusal(source)


def test_a_pipe_in_place_of_a_library(source):
    load(source)
    (library,) = libraries()
    library.unlink()
    os.mkfifo(library, 0o600)
    assert "delete it" in refusal(source)


def test_libraries_are_one_s_own_whatever_the_umask(source):
    before = os.umask(0)
    try:
        load(source)
    finally:
        os.umask(before)
    assert load(source).seven() == 7
    assert Path(os.environ["QLLM_CACHE"]).stat().st_mode & 0o777 == 0o700


# Several processes, and those that are killed.


def test_of_many_processes_one_compiles(monkeypatch, source, tmp_path, seven):
    work = compiler_script(
        tmp_path,
        monkeypatch,
        seven,
        'echo "$unit" >> "$work/log"; test "$unit" = library.so || sleep 0.3',
    )
    program = """
children = []
for _ in range(6):
    children.append(os.fork())
    if not children[-1]:
        try:
            os._exit(build.load(Path(sys.argv[1])).seven())
        finally:
            os._exit(1)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    process = forked(program, source)
    assert output(process) == f"{[7] * 6}\n"
    assert lines(work / "log") == ["a.cpp", "library.so"]
    assert temporary_folders() == [] and len(libraries()) == 1


def stopped_while_compiling(source: Path, work: Path, number: int) -> tuple[int, str, list[int]]:
    """Send a signal to a process that compiles: its status and errors, the compiler's pids."""
    start = python if number == signal.SIGINT else forked
    process = start("build.load(Path(sys.argv[1]))", source)
    pids = [int(pid) for pid in wait_for(work / "pids").split()]
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error, pids


def test_a_process_killed_while_it_compiles_is_no_trouble(monkeypatch, source, tmp_path, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, HANG_ONCE)
    status, _, pids = stopped_while_compiling(source, work, signal.SIGKILL)
    os.killpg(pids[0], signal.SIGKILL)  # nobody else can end the compiler now
    assert status == -signal.SIGKILL
    (left,) = temporary_folders()
    assert load(source).seven() == 7
    assert temporary_folders() == [left]  # for all we know, someone still works in it

    (source / "a.cpp").write_text(SEVEN + "\n")
    old = time.time() - build.STALE_SECONDS
    os.utime(left, (old + 60, old + 60))
    load(source)
    assert temporary_folders() == [left]

    (source / "a.cpp").write_text(SEVEN + "\n\n")
    os.utime(left, (old - 60, old - 60))
    load(source)
    assert temporary_folders() == []


def test_ctrl_c_leaves_no_folder_and_no_process(monkeypatch, source, tmp_path, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, HANG_ONCE)
    status, error, pids = stopped_while_compiling(source, work, signal.SIGINT)
    assert status == -signal.SIGINT and "KeyboardInterrupt" in error
    assert temporary_folders() == [] and libraries() == []
    until(lambda: all(map(is_gone, pids)))


def test_without_locks_it_compiles_all_the_same(source, own_cache):
    (own_cache / build.LOCK).mkdir(parents=True)
    assert load(source).seven() == 7


def test_a_lock_that_is_never_given_back_holds_up_nobody_for_ever(monkeypatch, source, own_cache):
    import fcntl

    own_cache.mkdir()
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.2)
    with (own_cache / build.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert load(source).seven() == 7
