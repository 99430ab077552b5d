"""Files and folders that have a name of their own until they are whole, or no longer needed.

The name says which process of which machine made one, and while that lives it holds a lock. What a
killed process leaves is removed by the next one that makes something of the same name.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What is younger, in seconds, may be of a process that is about to lock it; of another machine,
# that may have a lock which this one does not see.
YOUNG, YOUNG_ELSEWHERE = 60.0, 24 * 3600.0
LONGEST_NAME = 160  # bytes of a name that with what is added is a valid one
TRIES, PAUSE = 20, 0.01  # to lock what another process may be looking at


class Temporary:
    """A new file or folder beside a path.

    Attributes:
        path: where it is; it may be renamed.
    """

    def __init__(self, target: Path, *, folder: bool = False) -> None:
        """
        Args:
            target: what it may become; its folder is there.
        """
        mark = _mark(target)
        _remove_abandoned(target.parent, mark)
        prefix = f"{mark}{platform.node()}.{os.getpid()}."
        if folder:
            self.path = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
        else:
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=prefix)
            os.close(descriptor)
            self.path = Path(name)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        for _ in range(TRIES):
            with suppress(OSError):  # or there are no locks: then its process's number has to do
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(PAUSE)

    def remove(self) -> None:
        """Remove it, where it still has its name."""
        _remove(self.path)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder among the system's temporary files, for what is not needed behind the block.

    Args:
        name: says what it is for.
    """
    temporary = Temporary(Path(tempfile.gettempdir()) / f"qllm-{name}", folder=True)
    try:
        yield temporary.path
    finally:
        temporary.remove()
        temporary.close()


def is_running(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, for somebody else
    return True


def _mark(target: Path) -> str:
    """What the names of all that is temporary for a path begin with."""
    name = os.fsencode(target.name)
    short = target.name if len(name) <= LONGEST_NAME else hashlib.sha256(name).hexdigest()
    return f".{short}."


def _remove_abandoned(folder: Path, mark: str) -> None:
    """Remove what is temporary, of this user, and whose process was killed."""
    paths: list[Path] = []
    with suppress(OSError):  # a folder may be written to that may not be listed
        paths = list(folder.iterdir())
    for path in paths:
        rest = path.name.removeprefix(mark)
        host, _, process = rest.rpartition(".")[0].rpartition(".")
        if rest != path.name and host and process.isdecimal():
            with suppress(OSError):  # somebody else is as fast
                if _is_abandoned(path, host, int(process)):
                    _remove(path)


def _is_abandoned(path: Path, host: str, process: int) -> bool:
    if path.lstat().st_uid != os.geteuid() or path.is_symlink():
        return False
    held, here = _is_held(path), host == platform.node()
    if held or (here and not is_running(process)):
        return not held
    # A process that runs may have the number of one that was killed.
    newest = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    return held is False and time.time() - newest > (YOUNG if here else YOUNG_ELSEWHERE)


def _is_held(path: Path) -> bool | None:
    """Whether a process has the lock; None where that cannot be told."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
