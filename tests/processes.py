"""Processes that need not import torch, which takes two seconds: forks of one process that has.

The fork gets the arguments, environment, folder and standard streams of a process of its own, and
ends as one. Where it would not be what a user starts, because the environment has variables that
are read when torch is loaded, it is not taken. multiprocessing's "forkserver" is the process that
forks: it has no threads, and ends with the tests.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What scripts import, of others and in front of everything, and what they do not change there. The
# last are huggingface_hub's, which itself reads variables when it is imported.
PRELOADED = ("torch", "safetensors.torch", "tokenizers", "httpx2", "filelock", "tqdm.auto", "yaml")
# Read when libraries are loaded, so that a fork has those of the process that forks.
# Of these, those that are not.
LATER = ("OMP_NUM_THREADS", "TORCHELASTIC_ERROR_FILE", "CUDA_VISIBLE_DEVICES")
READ_AT_IMPORT = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "MALLOC_", "GLIBC_"),
    *("TORCH", "PYTORCH", "TRITON", "CUDA", "NVIDIA", "LD_", "PYTHON", "LC_", "LANG"),
)
THREADS = "OMP_NUM_THREADS"  # which torch.set_num_threads stands in for

_context = multiprocessing.get_context("forkserver")
_environment: dict[str, str] = {}  # of the process that forks


def _fixed(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that count when libraries are loaded."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in LATER
    }


def can_fork(environment: Mapping[str, str]) -> bool:
    """Whether a fork would run as a new process does."""
    if sys.platform != "linux":
        return False
    if not _environment:
        _environment.update(os.environ)
        _context.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    return _fixed(environment) == _fixed(_environment)


class Forked:
    """A Python process that is a fork, with some of `subprocess.Popen`'s methods.

    Args:
        words: as after `python`: a script and its arguments, or -c and a program.
        env: the environment, for which `can_fork`.
    """

    def __init__(
        self,
        words: list[str],
        env: Mapping[str, str],
        *,
        cwd: str | os.PathLike | None = None,
        input: str = "",
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name, name) for name in ("in", "out", "err")]
        for stream, text in zip(self._streams, (input, "", ""), strict=True):
            stream.write_text(text, encoding="utf-8", newline="")
        given = (words, dict(env), str(cwd or Path.cwd()), [*map(str, self._streams)])
        self.args = words
        self.returncode: int | None = None
        self._process = _context.Process(target=_become, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """
        Raises:
            subprocess.TimeoutExpired: it did not end.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end: standard output and error.

        Raises:
            subprocess.TimeoutExpired: it was killed, as it did not end.
        """
        self._process.join(timeout)
        late = self.poll() is None
        if late:
            self.kill()
            self._process.join()
        self.returncode = self.poll()
        out, error = (path.read_text(encoding="utf-8") for path in self._streams[1:])
        self._folder.cleanup()
        if late:
            raise subprocess.TimeoutExpired(self.args, timeout, out, error)
        return out, error


def start(words: list[str], env: Mapping[str, str]) -> Forked | subprocess.Popen:
    """Python with some words, in a fork where it may be one: `subprocess.Popen`, for text."""
    if can_fork(env):
        return Forked(words, env)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], env=env, text=True, **pipes)


def start_ranks(
    world: int, words: list[str], errors: Path | None = None
) -> list[Forked | subprocess.Popen]:
    """A script on so many ranks of this host, with the environment that torchrun gives them.

    Args:
        errors: a folder in which torchrun would let the ranks write their errors.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(world):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        if errors:
            own["TORCHELASTIC_ERROR_FILE"] = errors / str(rank) / "error.json"
        ranks.append(start(words, os.environ | {name: str(value) for name, value in own.items()}))
    return ranks


def run(
    words: list[str],
    env: Mapping[str, str],
    *,
    timeout: float | None = None,
    preexec_fn: Callable[[], None] | None = None,
    **options,
) -> subprocess.CompletedProcess:
    """Python with some words, in a fork where it may be one: `subprocess.run`, for text."""
    if preexec_fn is None and can_fork(env):
        process = Forked(words, env, **options)
        out, error = process.communicate(timeout)
        return subprocess.CompletedProcess(words, process.returncode, out, error)
    options |= {"preexec_fn": preexec_fn, "timeout": timeout, "env": env}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def _is_of_the_tests(path: str) -> bool:
    """Whether an entry of sys.path is of the project, and not of an environment inside of it."""
    return Path(path).is_relative_to(ROOT) and "site-packages" not in path


def _become(words: list[str], environment: dict[str, str], folder: str, streams: list[str]) -> None:
    """Turn this process into `python` with these words, and end."""
    for number, path in enumerate(streams):
        stream = os.open(path, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the one that was there is none
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if THREADS in environment:
        import torch

        torch.set_num_threads(int(environment[THREADS]))
    first, *rest = words
    own = "" if first == "-c" else str(Path(first).parent)
    sys.path[:] = [own, *(path for path in sys.path if not _is_of_the_tests(path))]
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
