"""What torchrun tells a process, and what this one sees of the others that it started here.

Nothing heavy is imported: a rank has to say why it ends before torch is there, too.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qllm.errors import UserError

if TYPE_CHECKING:
    import psutil

CLAIM = "qllm-said"
START = "start processes by torchrun, which sets it, or unset RANK and WORLD_SIZE for one"
# What torchrun gives all ranks of a run alike, and no other run on this host.
RUN = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """This process among those that torchrun started; alone where it was not started so.

    Attributes:
        rank, world: of all processes.
        local: the rank on its own host.
        here: the ranks that this host's torchrun started.
        master, port: the address by which ranks find each other; port 0 where there is no other.
    """

    rank: int
    world: int
    local: int
    here: range
    master: str
    port: int

    @classmethod
    def of_environment(cls) -> Launch:
        """As torchrun sets it in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, …

        Raises:
            UserError: for values that torchrun does not set, or some without the others.
        """
        world = _number("WORLD_SIZE", 1, 1)
        rank = _number("RANK", 0, 0, world - 1)
        local = _number("LOCAL_RANK", rank, 0, rank)
        count = _number("LOCAL_WORLD_SIZE", 0, 0, world)
        port = _number("MASTER_PORT", 0, 0, 65535) if world > 1 else 0
        if world > 1 and port == 0:
            raise UserError(f"WORLD_SIZE is {world} and there is no MASTER_PORT; {START}")
        here = range(rank - local, rank - local + count)
        return cls(rank, world, local, here, os.environ.get("MASTER_ADDR", "127.0.0.1"), port)


def _number(name: str, default: int, minimum: int, maximum: int = 1_000_000) -> int:
    """A whole number of the environment.

    Raises:
        UserError: it is none, or out of range.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not minimum <= int(text) <= maximum:
        raise UserError(f"{name} is {text!r} in the environment; {START}")
    return int(text)


def claim() -> bool:
    """Whether this process is the first of its torchrun's to say why the run ends.

    A file in the folder that torchrun makes for its processes' errors settles it; where there is
    none, the first local rank speaks.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if file:
            path = Path(file).parent.parent / CLAIM
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            return True
    except FileExistsError:
        return False
    except OSError:
        pass  # no folder, or none that takes files
    return os.environ.get("LOCAL_RANK", "0") == "0"


def trouble(rank: int) -> str | None:
    """What keeps a rank that this host's torchrun started; None where it runs, or is elsewhere."""
    import psutil

    if rank not in Launch.of_environment().here:
        return None
    processes = _processes().get(rank, [])
    states = {process.pid: _status(process) for process in processes}
    stopped = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    for pid, state in states.items():
        if state in stopped:
            return f"its process {pid} is stopped"
    dead = (None, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return "its process has died" if all(state in dead for state in states.values()) else None


def lost() -> str | None:
    """The first rank of this host's that is in trouble, and which."""
    launch = Launch.of_environment()
    for rank in launch.here:
        if rank != launch.rank and (reason := trouble(rank)):
            return f"rank {rank}: {reason}"
    return None


def end_stopped(rank: int) -> None:
    """Kill a rank of this run that the same torchrun started, and that is stopped.

    This is the one signal that a run sends. No other reaches a stopped process; torchrun would send
    it too, but 30 s after the others have ended, and --timeout promises less.
    """
    import psutil

    if "stopped" in (trouble(rank) or ""):
        for process in _processes().get(rank, []):
            try:
                process.send_signal(signal.SIGKILL)  # to no other process that got the number since
            except psutil.Error:
                continue


def _processes() -> dict[int, list[psutil.Process]]:
    """The ranks of this run below the process that started this one as a rank, its torchrun.

    Runs that were started by hand, without torchrun, may have a shell in common: what RUN names
    tells them apart.
    """
    import psutil

    launcher: psutil.Process | None = psutil.Process()
    while launcher is not None and "RANK" in _environment(launcher):
        launcher = launcher.parent()
    found: dict[int, list[psutil.Process]] = {}
    for process in [] if launcher is None else launcher.children(recursive=True):
        environment = _environment(process)
        rank = environment.get("RANK", "")
        ours = all(environment.get(key) == os.environ.get(key) for key in RUN)
        if ours and rank.isdecimal():
            found.setdefault(int(rank), []).append(process)
    return found


def _environment(process: psutil.Process) -> dict[str, str]:
    import psutil

    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _status(process: psutil.Process) -> str | None:
    import psutil

    try:
        return process.status()
    except psutil.Error:
        return None
