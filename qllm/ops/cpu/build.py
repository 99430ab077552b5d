"""The C++ kernels: compiled by the system's compiler at first use, kept in a cache, and loaded.

A library is named after a hash of all that goes into it, so that a changed source, flag or compiler
makes a new one, and an old one never stands in for it. What is loaded is a copy in memory of what
was checked, from a folder that others cannot write to, wherever it is mounted. `CXX` names the
compiler, `QLLM_CACHE` the folder, and `QLLM_CXXFLAGS` adds flags, such as those of the sanitizers
(with the sanitizer's own library, which `g++ -print-file-name=libasan.so` finds, in `LD_PRELOAD`):

    QLLM_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all"
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qllm import cgroups, folders
from qllm.errors import first_line

SOURCE = Path(__file__).parent / "src"

COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"),
    # Else a compiler fuses a * b + c where the instruction set can, and paths round differently.
    "-ffp-contract=off",
    # Sums of integers wrap, as those of vector instructions do.
    "-fwrapv",
    # Vectors wider than the instruction set's are passed within one file only; GCC 12's own headers
    # use what they have not initialized.
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
    *("-mfma", "-mf16c", "-mbmi2"),
)
# By the stem of a source file: the instructions that it may use, on top of plain x86-64.
# Those that take longest stand first, and are compiled first.
FLAGS: dict[str, tuple[str, ...]] = {
    "avx512linear": _AVX512,
    "avx512halves": _AVX512,
    "avx2linear": _AVX2,
    "avx2halves": _AVX2,
    "avx2": _AVX2,
    "avxvnnilinear": (*_AVX2, "-mavxvnni"),
    "avxvnnihalves": (*_AVX2, "-mavxvnni"),
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "scalar": ("-O2",),  # -O3 compiles twice as long, for code that few machines run
    "avx512": _AVX512,
    "avx2int8": _AVX2,
    "avx2int8halves": _AVX2,
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
}
# Not -fopenmp: it would bring the compiler's libgomp. A shared object may leave GOMP_* undefined.
LINK = ("-shared",)

# g++ first: clang calls functions (__kmpc_*) that the libgomp of torch's wheels does not have.
COMPILERS = ("g++", "c++", "clang++")
OTHER_COMPILER = "set CXX to another compiler, such as g++ 11 or newer"
OTHER_FOLDER = f"set {folders.CACHE} to a folder of your own"
SYSTEM_OPENMP = "libgomp.so.1"
TIMEOUT = 300.0
LOCK_SECONDS = 2 * TIMEOUT  # compiling, and linking
STALE_SECONDS = 24 * 3600.0
TEMPORARY = "cpu-build-"
LOCK = "cpu.lock"
LIBRARY = "library.so"
OPENING = os.O_NOFOLLOW | os.O_NONBLOCK  # neither a link, nor a pipe that keeps us waiting
DIGEST_BYTES = hashlib.sha256().digest_size


class Unavailable(Exception):  # noqa: N818 - it says what is the case, not what went wrong
    """The kernels cannot be had here; one line says what is missing and what would work."""


@dataclass(frozen=True)
class _Recipe:
    """All that decides what a library will be.

    Attributes:
        sources: name and content of every file that is compiled or included.
        compiling: the commands that may run beside each other; names are those of `sources`.
        linking: the command after them, which makes LIBRARY.
        compiler: the file that runs, and what it says of its version.
        machine: what the processor is called.
    """

    sources: dict[str, bytes]
    compiling: list[list[str]]
    linking: list[str]
    compiler: tuple[str, str]
    machine: str

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@cache
def load(source: Path = SOURCE, omitted: frozenset[str] = frozenset()) -> ctypes.CDLL:
    """The library of the kernels, compiled where the cache has none.

    Args:
        source: a folder; each *.cpp in it is compiled by itself, and sees the *.h beside it.
        omitted: the stems of those *.cpp that are not.

    Raises:
        Unavailable: after all was tried again at each call, which may take as long as compiling.
    """
    recipe = _recipe(source, omitted)
    _share_openmp()
    reasons: list[str] = []
    for folder in folders.search_path(folders.CACHE):
        try:
            path = folder / f"cpu-{recipe.key}.so"
            return _cached(path) or _made(path, recipe, folders.fallback(folder, reasons))
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or first_line(error)}")
    where = "; ".join(reasons) or folders.NO_HOME
    raise Unavailable(f"the CPU kernels cannot be kept ({where}); {OTHER_FOLDER}")


def _made(path: Path, recipe: _Recipe, fallback: str | None) -> ctypes.CDLL:
    """The library of a recipe, compiled into `path` unless another process just did.

    Args:
        fallback: what to say of the folder, where it is not the usual one.

    Raises:
        OSError: it cannot be kept there.
    """
    folders.make(path.parent)
    path = folders.check_private(path.parent) / path.name
    with _locked(path.parent / LOCK):
        if library := _cached(path):
            return library
        if fallback:
            _note(f"the CPU kernels are kept in {fallback}; {OTHER_FOLDER}")
        _compile(path, recipe)
    if library := _cached(path):
        return library
    raise Unavailable(f"{path} is not what was written to it; {OTHER_FOLDER}")


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr, flush=True)


def _recipe(folder: Path, omitted: frozenset[str] = frozenset()) -> _Recipe:
    """How the sources of a folder are compiled on this machine, without some units."""
    machine = platform.machine()
    if sys.platform != "linux" or machine != "x86_64":
        system = platform.system()
        raise Unavailable(f"the CPU kernels are for x86-64 Linux; this is {machine} {system}")
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))
        sources = {path.name: path.read_bytes() for path in paths}
    except OSError as error:
        raise Unavailable(f"the CPU kernels cannot be read ({error}); reinstall QLLM") from error
    units = [path.stem for path in paths if path.suffix == ".cpp" and path.stem not in omitted]
    units.sort(key=[*FLAGS, *units].index)
    if not units:
        raise Unavailable(f"the CPU kernels are missing ({folder}/*.cpp); reinstall QLLM")
    compiler, extra = _compiler(), _words("QLLM_CXXFLAGS")
    compiling = [
        [*compiler, *COMMON, *FLAGS.get(unit, ()), *extra, "-c", f"{unit}.cpp", "-o", f"{unit}.o"]
        for unit in units
    ]
    linking = [*compiler, *LINK, *(f"{unit}.o" for unit in units), *extra, "-o", LIBRARY]
    (version,) = _run([[*compiler, "--version"]])
    identity = (str(Path(compiler[0]).resolve()), version)
    return _Recipe(sources, compiling, linking, identity, machine)


def _compiler() -> list[str]:
    """The command of the C++ compiler, its first word an absolute path."""
    command = _words("CXX")
    for name in command[:1] or COMPILERS:
        if found := shutil.which(name):
            # A link stays one: what ccache and clang do depends on the name they are called by.
            return [str(Path(found).absolute()), *command[1:]]
    names = f"CXX={command[0]}" if command else ", ".join(COMPILERS)
    raise Unavailable(f"no C++ compiler for the CPU kernels ({names} not found); install g++")


def _words(variable: str) -> list[str]:
    """The words of an environment variable, split as a shell does."""
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        reason = f"{variable}={value!r} cannot be split ({first_line(error)})"
        raise Unavailable(f"{reason}; quote it as in a shell") from error


def _cached(path: Path) -> ctypes.CDLL | None:
    """The library at `path`; None where there is none, or one that is damaged.

    Raises:
        OSError: someone else could have written it, and it would run with our rights.
        Unavailable: it is whole, and does not load; compiled again it would be the same.
    """
    try:
        path = folders.check_private(path.parent) / path.name
        with os.fdopen(os.open(path, os.O_RDONLY | OPENING), "rb") as file:
            status = os.fstat(file.fileno())
            if (who := folders.whose(status)) or not stat.S_ISREG(status.st_mode):
                reason = f"{path} may be another user's work, {who or 'no file'}: delete it"
                raise PermissionError(errno.EACCES, reason)
            content = file.read()
    except FileNotFoundError:
        return None
    # The system loads a file that was cut short, and the process dies in what is not there.
    if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        return None
    try:
        # It stays open: the loader knows what it has by its path, and would take the number for
        # this library, whatever else is opened under it later.
        copy = os.memfd_create(path.name)
        with os.fdopen(copy, "wb", closefd=False) as file:
            file.write(content)
        return ctypes.CDLL(f"/proc/self/fd/{copy}")
    except OSError as error:
        reason = first_line(error)
        raise Unavailable(f"the CPU kernels do not load ({reason}); {OTHER_COMPILER}") from error


def _compile(path: Path, recipe: _Recipe) -> None:
    """Make the library at `path`: whole, with its hash behind it, or not at all."""
    for old in path.parent.glob(f"{TEMPORARY}*"):  # of processes that were killed
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(
        prefix=TEMPORARY, dir=path.parent, ignore_cleanup_errors=True
    ) as temporary:
        # A copy: what is compiled is what was hashed, even if a file is edited meanwhile.
        folder = Path(temporary)
        for name, content in recipe.sources.items():
            (folder / name).write_bytes(content)
        _note("compiling the CPU kernels (once, about 20 s) ...")
        start = time.monotonic()
        _run(recipe.compiling, folder)
        _run([recipe.linking], folder)
        library = folder / LIBRARY
        if not library.exists():
            raise Unavailable(f"{recipe.linking[0]} makes no library; {OTHER_COMPILER}")
        content = library.read_bytes()
        library.write_bytes(content + hashlib.sha256(content).digest())
        library.chmod(0o755)
        library.replace(path)
    _note(f"the CPU kernels are compiled, in {time.monotonic() - start:.0f} s")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; all at once where the file system has no locks.

    Nor does one wait for ever for a process that was stopped: the work is then done twice.
    """
    import fcntl  # not on Windows

    with ExitStack() as stack:
        with suppress(OSError):
            file = stack.enter_context(path.open("a"))
            deadline = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
        yield


def _run(commands: list[list[str]], folder: Path | None = None) -> list[str]:
    """What commands print, beside each other, one per processor; the first to fail ends them all.

    None outlives this: threads hold the processes, and Ctrl-C does not reach threads.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(cgroups.usable_cpus()) as pool:
        try:
            jobs = [pool.submit(_output, command, folder, stop) for command in commands]
            return [job.result() for job in as_completed(jobs)]
        finally:
            stop.set()


def _output(command: list[str], folder: Path | None, stop: threading.Event) -> str:
    """What a command prints that runs in `folder`, and keeps there what it needs."""
    environment = {**os.environ, "LC_ALL": "C"}
    environment.pop("LD_PRELOAD", None)  # meant for us: a sanitizer finds leaks in compilers
    if folder:
        environment["TMPDIR"] = str(folder)
    # Memory, not a pipe, which would fill up, or stay open in a process that a compiler started.
    with os.fdopen(os.memfd_create("compiler"), "r+b") as log:
        status = _status(command, stop, stdout=log, stderr=log, cwd=folder, env=environment)
        log.seek(0)
        said = log.read().decode(errors="replace")
    if status:
        reason = _first_error(said) or f"status {status}"
        if os.strerror(errno.ENOSPC) in reason:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise Unavailable(f"{command[0]} fails on the CPU kernels ({reason}); {OTHER_COMPILER}")
    return said


def _status(command: list[str], stop: threading.Event, **options: Any) -> int:
    """How a command ends; a group of processes, for a compiler is one. `stop` kills it."""
    if stop.is_set():
        return 0
    options |= {"stdin": subprocess.DEVNULL, "start_new_session": True}
    try:
        process = subprocess.Popen(command, **options)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise Unavailable(f"{command[0]} does not run ({reason}); {OTHER_COMPILER}") from error
    deadline = time.monotonic() + TIMEOUT
    while not stop.is_set() and time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    raise Unavailable(f"{command[0]} hangs ({TIMEOUT:.0f} s); {OTHER_COMPILER}")


def _first_error(said: str) -> str:
    """The line of a compiler's output that says why it failed, "" where it says nothing."""
    # The compiler's "collect2: error: ld returned 1" hides what the linker said before it.
    lines = [line.strip() for line in said.splitlines() if not line.startswith("collect2:")]
    errors = (line for line in lines if re.search(r"\berror[: ]", line, re.IGNORECASE))
    return next(errors, lines[-1] if lines else "")


def _share_openmp() -> None:
    """Let the kernels find the OpenMP library that torch has, so that it knows of their threads."""
    try:
        ctypes.CDLL(_openmp_of_torch() or SYSTEM_OPENMP, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        reason = f"torch has no OpenMP library, nor has the system ({first_line(error)})"
        raise Unavailable(f"{reason}; install libgomp, or torch from PyPI") from error


def _openmp_of_torch() -> str | None:
    """The file with the functions that torch's parallel loops call; None where there are none.

    A process may hold several (scikit-learn brings one too), so it is not looked for by its name.
    """
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        span, *_, path = line.split(maxsplit=5)
        first, end = (int(number, 16) for number in span.split("-"))
        if first <= address < end:
            return path
    return None
