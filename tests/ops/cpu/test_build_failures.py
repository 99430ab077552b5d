"""Kernels that cannot be compiled: one line says why, and nothing half-made is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time

import pytest
from building import (
    HANG_ONCE,
    MARKS,
    SEVEN,
    compiler_script,
    folder_of,
    is_gone,
    load,
    python,
    refusal,
    until,
    wait_for,
)

from qllm.ops.cpu import build

pytestmark = MARKS

# What cannot work.


def test_other_machines(monkeypatch, source):
    with monkeypatch.context() as patch:
        patch.setattr(build.platform, "machine", lambda: "aarch64")
        assert "x86-64 Linux; this is aarch64 Linux" in refusal(source)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    assert "this is x86_64 Darwin" in refusal(source)


def test_no_sources(tmp_path):
    assert str(tmp_path / "none") in refusal(tmp_path / "none")
    assert "*.cpp" in refusal(folder_of(tmp_path / "src", {"a.h": ""}))


def test_no_compiler(monkeypatch, source, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert "CXX=no-such-compiler not found" in refusal(source)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX")
    message = refusal(source)
    assert "g++, c++, clang++ not found" in message and "install g++" in message


def test_the_first_compiler_there_is_serves(monkeypatch, source, tmp_path):
    (tmp_path / "cxx").rename(tmp_path / "clang++")
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    monkeypatch.setenv("CXX", " ")
    assert build._compiler() == [str(tmp_path / "clang++")]
    for name in ("c++", "g++"):
        shutil.copy(tmp_path / "clang++", tmp_path / name)
        assert build._compiler() == [str(tmp_path / name)]


@pytest.mark.parametrize("variable", ["CXX", "QLLM_CXXFLAGS"])
def test_a_variable_that_is_no_list_of_words(monkeypatch, source, variable):
    monkeypatch.setenv(variable, "g++ '")
    assert variable in refusal(source)


def test_a_mistake_in_a_source(real_compiler, source):
    (source / "a.cpp").write_text("int on_error() {\n#warning look out\nreturn nothing;\n}\n")
    message = refusal(source)
    assert "a.cpp:3:8: error: " in message and "nothing" in message and "another comp" in message


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("#!/bin/sh\nexit 3\n", "status 3"),
        ("#!/bin/sh\nkill -9 $$\n", "status -9"),
        (
            "#!/bin/sh\necho first; echo strange; echo 'collect2: error: ld' >&2; exit 1\n",
            "strange",
        ),
        ("#!/bin/sh\necho one; echo 'as: Fatal error: two'; echo three; exit 1\n", "error: two"),
        (
            "#!/bin/sh\ntest $# = 1 || { echo 'error: No space left on device'; exit 1; }\n",
            "cannot be kept",
        ),
        ("#!/bin/sh\n", "makes no library"),
        ("#!/no/such/interpreter\n", "does not run (No such file"),
        ("no script", "does not run (Exec format error)"),
    ],
)
def test_a_compiler_that_fails(monkeypatch, source, tmp_path, script, words):
    path = tmp_path / "cxx"
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    message = refusal(source)
    assert words in message and (str(path) in message) == (words != "cannot be kept")
    assert ("another compiler" in message) == (words != "cannot be kept")


def test_a_compiler_that_hangs(monkeypatch, source, tmp_path, seven):
    work = compiler_script(tmp_path, monkeypatch, seven, HANG_ONCE)
    monkeypatch.setattr(build, "TIMEOUT", 1.0)
    assert "cxx hangs (1 s)" in refusal(source)
    pids = wait_for(work / "pids").split()
    until(lambda: all(is_gone(int(pid)) for pid in pids))


def test_one_unit_that_fails_ends_the_others(monkeypatch, tmp_path, seven):
    hang = "case $unit in a.cpp) exit 1;; b.cpp) sleep 600 & wait;; esac"
    compiler_script(tmp_path, monkeypatch, seven, hang)
    start = time.monotonic()
    refusal(folder_of(tmp_path / "src", {"a.cpp": "", "b.cpp": ""}))
    assert time.monotonic() - start < 60


def test_a_folder_for_temporary_files_serves_where_there_is_no_home(monkeypatch, source, capsys):
    folders = build.folders
    monkeypatch.delenv("QLLM_CACHE")
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(source.parent))
    assert load(source).seven() == 7
    note, *_ = capsys.readouterr().err.splitlines()
    assert f"kept in {folders.temporary()}" in note and "/proc/none" in note
    assert "set QLLM_CACHE" in note
    assert folders.temporary().stat().st_mode & 0o777 == 0o700
    assert load(source).seven() == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_is_a_file(monkeypatch, source, tmp_path, below):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLLM_CACHE", str(tmp_path / "file" / below))
    message = refusal(source)
    assert f"{tmp_path}/file" in message and "set QLLM_CACHE" in message


def test_a_cache_that_cannot_be_created(monkeypatch, source):
    monkeypatch.setenv("QLLM_CACHE", "/proc/qllm")
    assert "/proc/qllm" in refusal(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_the_right_to_write(source, own_cache):
    own_cache.mkdir(mode=0o555)
    assert "Permission denied" in refusal(source)


def test_a_disk_that_is_full_and_one_that_is_read_only(source, tmp_path):
    # A disk of this test's own, of 16 KB at first: even root cannot write what does not fit. Nor
    # does it run anything from there, which keeps nobody from loading what it holds.
    program = f"""
import subprocess
def mount(options):
    command = ["mount", "-t", "tmpfs", "-o", options, "none", sys.argv[2]]
    if subprocess.run(command, check=False).returncode:
        sys.exit(77)
def refusal(source):
    try:
        build.load.__wrapped__(source)
    except build.Unavailable as error:
        return str(error)
source, disk = map(Path, sys.argv[1:])
mount("size=16k,noexec")
os.environ["QLLM_CACHE"] = str(disk)
print(refusal(source))
print([path.name for path in disk.iterdir()])
mount("remount,noexec,size=10m")
assert build.load.__wrapped__(source).seven() == 7
mount("remount,noexec,ro")
assert build.load.__wrapped__(source).seven() == 7
(source / "a.cpp").write_text({SEVEN + "//"!r})
print(refusal(source))
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = ("unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []))
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no right to mount a disk")
    process = python(program, source, disk, wrapped_in=unshare)
    out, error = process.communicate(timeout=120)
    if process.returncode == 77:
        pytest.skip("no right to mount a disk")
    assert process.returncode == 0, error
    full, left, read_only = out.splitlines()
    assert "No space left on device" in full and "set QLLM_CACHE" in full
    assert left == str([build.LOCK])
    assert "Read-only file system" in read_only and str(disk) in read_only
