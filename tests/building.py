"""Sources of libraries, and a compiler that hands out one made before."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from conftest import ROOT

from qllm.ops.cpu import build
from qllm.ops.cpu.build import Unavailable

EXPORT = 'extern "C" __attribute__((visibility("default")))'
SEVEN = f"{EXPORT} int seven() {{ return 7; }}\n"
# The first compiler to run says its process and hangs, and so does a child of its own.
HANG_ONCE = """
if mkdir "$work/once" 2> "$work/errors"; then
    sleep 600 &
    echo "$$ $!" > "$work/pids"
    wait
fi
"""
MARKS = [
    pytest.mark.skipif(
        sys.platform != "linux" or not any(map(shutil.which, build.COMPILERS)),
        reason="compiles C++ on Linux",
    ),
    pytest.mark.usefixtures("own_cache"),
]


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    """A library, as `SEVEN` becomes one."""
    folder = tmp_path_factory.mktemp("seven")
    (folder / "a.cpp").write_text(SEVEN)
    (compiler, *_) = filter(None, map(shutil.which, build.COMPILERS))
    command = [compiler, *build.LINK, "-fPIC", "a.cpp", "-o", build.LIBRARY]
    subprocess.run(command, cwd=folder, check=True)
    return folder / build.LIBRARY


@pytest.fixture
def own_cache(monkeypatch, tmp_path, seven) -> Path:
    """An empty cache, and a compiler that makes what `seven` is."""
    for name in ("QLLM_CXXFLAGS", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    compiler_script(tmp_path, monkeypatch, seven, "")
    folder = tmp_path / "cache"
    monkeypatch.setenv("QLLM_CACHE", str(folder))
    return folder


@pytest.fixture
def real_compiler(monkeypatch) -> None:
    """The compiler of this machine."""
    monkeypatch.delenv("CXX")


@pytest.fixture
def source(tmp_path) -> Path:
    """A source folder of one unit, a.cpp."""
    return folder_of(tmp_path / "src", {"a.cpp": SEVEN})


def folder_of(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def load(source: Path) -> ctypes.CDLL:
    """As if for the first time in this process."""
    return build.load.__wrapped__(source)


def compiler_script(
    tmp_path: Path, monkeypatch, seven: Path, before: str, name: str = "cxx"
) -> Path:
    """A compiler which is $CXX, and does something before it makes a copy of `seven`.

    Its variable $unit is the file compiled, or library.so; `work` is a folder of its own.
    """
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    script = tmp_path / name
    script.write_text(
        f"#!/bin/sh\nwork='{work}'\n"
        'case "$*" in *--version) echo 1; exit;; esac\n'
        'case "$*" in *" -c "*) unit=${*##* -c }; unit=${unit%% *};; *) unit=library.so;; esac\n'
        f"{before}\nfor last; do :; done\ncp '{seven}' \"$last\"\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return work


def refusal(source: Path) -> str:
    """Why there are no kernels: one line; and nothing half-made is left."""
    with pytest.raises(Unavailable) as caught:
        load(source)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    assert temporary_folders() == []
    return message


def temporary_folders() -> list[Path]:
    return list(Path(os.environ["QLLM_CACHE"]).glob(f"{build.TEMPORARY}*"))


def libraries() -> list[Path]:
    return sorted(Path(os.environ["QLLM_CACHE"]).glob("*.so"))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for(path: Path) -> str:
    """The first line of a file that another process writes."""
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return path.read_text().strip()


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def forked(program: str, *args: object) -> processes.Forked | subprocess.Popen:
    """What `python` does, without the import of torch; Ctrl-C does not end it as it ends that."""
    start = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
    start += "from qllm.ops.cpu import build\n"
    return processes.start(["-c", start + program, *map(str, args)], os.environ)


def python(program: str, *args: object, wrapped_in: tuple[str, ...] = ()) -> subprocess.Popen:
    """A fresh Python that has the loader, and starts with `from pathlib import Path`."""
    start = "import os, signal, sys\nfrom pathlib import Path\nfrom qllm.ops.cpu import build\n"
    # In a shell's background, where the tests may run, Ctrl-C is ignored.
    start += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [*wrapped_in, sys.executable, "-c", start + program, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: processes.Forked | subprocess.Popen) -> str:
    """What it printed, and that it ended well."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out
