"""The folders that QLLM keeps things in, and who else could have put something there.

`QLLM_HOME` names the folder of converted checkpoints and of statistics, `QLLM_CACHE` that of the
compiled kernels. Without them both are `qllm` in the user's cache folder (`XDG_CACHE_HOME`, or
`~/.cache`); and where that cannot be, `qllm-UID` in the system's folder for temporary files.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qllm.errors import UserError, WritingError, first_line
from qllm.progress import Note
from qllm.temporary import Temporary

HOME, CACHE = "QLLM_HOME", "QLLM_CACHE"
# What a disk says that takes no more, whatever is written to it.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_HOME = "this user has no home directory"


def search_path(variable: str) -> list[Path]:
    """The folders to look into, the preferred one first; if `variable` names one, that alone.

    Raises:
        UserError: the variable names the home of somebody who has none.
    """
    if own := os.environ.get(variable):
        try:
            return [Path(own).expanduser().absolute()]
        except RuntimeError as error:
            raise UserError(f"{variable}={own}: {first_line(error)}; name a folder") from None
    found = []
    with suppress(RuntimeError):  # neither HOME nor a line of the password file
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        found.append(cache.absolute() / "qllm")
    if last := temporary():
        found.append(last)
    return found


def temporary() -> Path | None:
    """A folder of this user's in the system's for temporary files; None where that has none."""
    try:
        return Path(tempfile.gettempdir()).absolute() / f"qllm-{os.geteuid()}"
    except FileNotFoundError:
        return None


def find(name: str) -> Path | None:
    """The path of what QLLM keeps under a name; None where there is nothing."""
    for folder in search_path(HOME):
        with suppress(OSError):
            if (folder / name).exists() and (folder != temporary() or check_private(folder)):
                return folder / name
    return None


def home_path(name: str, note: Note, option: str = "") -> Path:
    """Where to keep something under a name.

    Args:
        note: called with a line, where it is not the usual folder.
        option: by which a user names another place.

    Raises:
        UserError: there is no place.
    """
    reasons: list[str] = []
    for folder in search_path(HOME):
        try:
            make(folder)
            if where := fallback(folder, reasons):
                check_private(folder)
                note(f"what is made is kept in {where}; set {HOME} to a folder of your own")
            return folder / name
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or first_line(error)}")
    why = "; ".join(reasons) or NO_HOME
    other = f"name one with {option}, or set {HOME}" if option else f"set {HOME} to one"
    raise UserError(f"there is no folder to keep {name} in ({why}); {other}")


def fallback(folder: Path, reasons: list[str]) -> str | None:
    """What to say of a folder of `search_path`, where it is not the usual one.

    Args:
        reasons: why the folders in front of it do not serve.
    """
    why = "; ".join(reasons) or NO_HOME
    return f"{folder}, which may be cleared ({why})" if folder == temporary() else None


def make(folder: Path) -> None:
    """Make a folder and what is missing above it, for this user alone.

    Raises:
        OSError: it cannot be made, or nothing can be written into it.
    """
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        missing.mkdir(0o700, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        reason = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(reason, os.strerror(reason), str(folder))


def check_private(folder: Path) -> Path:
    """The folder without links on the way, where nobody but this user and root can change it.

    Raises:
        PermissionError: somebody else can.
        OSError: there is no such folder.
    """
    folder = folder.resolve(strict=True)
    for each in (folder, *folder.parents):
        status = each.stat()
        # Of a sticky folder, such as /tmp, everybody can remove what is his own, and nothing else.
        sticky = bool(status.st_mode & stat.S_ISVTX)
        # In a user namespace root outside of it has no number; such a folder is not ours to make.
        unmapped = each != folder and status.st_uid == _unmapped()
        if (who := whose(status, sticky)) and not (unmapped and not _writable(status, sticky)):
            raise PermissionError(errno.EACCES, f"others may change {each}: {who}", str(each))
    return folder


def whose(status: os.stat_result, sticky: bool = False) -> str | None:
    """Who besides this user and root may change what has this status, None where nobody does."""
    if status.st_uid in (0, os.geteuid()) and not _writable(status, sticky):
        return None
    return f"owner {status.st_uid}, mode {status.st_mode & 0o7777:o}"


def _writable(status: os.stat_result, sticky: bool) -> bool:
    if sticky:
        return False
    group = status.st_mode & stat.S_IWGRP and not _own_group(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH or group)


def _own_group(number: int) -> bool:
    """Whether a group is root's, or one of this user alone, as many systems give to each user."""
    import grp  # not on Windows
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:
        return number == 0
    alone = (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name)
    return number == 0 or (alone and set(group.gr_mem) <= {user.pw_name})


def _unmapped() -> int | None:
    """The number that stands for users whom this namespace does not know; None: it knows all."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


@contextmanager
def writing(path: Path, only: Collection[int] | None = None) -> Iterator[None]:
    """What keeps a file or folder from being written is one line that says what would work.

    Args:
        only: the errors that this is about; others are of what is read meanwhile.

    Raises:
        WritingError: naming the file that the system names, else `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (only is not None and error.errno not in only):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"{free_bytes(path) / 1e9:.2f} GB are free there; free some, or name another"
        elif error.errno == errno.EFBIG:
            advice = "the file system or a limit (ulimit -f) allows no larger file; name another"
        else:
            advice = "name another"
        found = path if error.filename is None else Path(os.fsdecode(error.filename))
        if found.name.startswith(f".{path.name}."):  # a temporary one, which becomes `path`
            found = path
        raise WritingError(
            f"{found} cannot be written ({error.strerror}); {advice} place"
        ) from error


def partial_path(target: Path) -> Path:
    """Where what takes long to make lies until it is whole; see `checkpoint.resume`."""
    path = target.resolve()
    return path.parent / f"{path.name}.partial"


def check_new(target: Path) -> None:
    """Refuse to write a folder where something is.

    Raises:
        UserError: there is a file, or a folder that is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"{target} is there already and not empty; name another folder with `save`, or remove "
            "it"
        )


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before what it is to hold is worked for.

    Raises:
        WritingError: as `writing`.
    """
    with writing(path):
        temporary = Temporary(path)
    temporary.remove()
    temporary.close()


def check_free_space(path: Path, needed: int) -> None:
    """Refuse to write what the disk has no room for.

    Raises:
        WritingError: with both numbers, where `needed` bytes are more than are free.
    """
    free = free_bytes(path)
    if needed > free:
        raise WritingError(
            f"{path} takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
            "free some, or name another place"
        )


def free_bytes(path: Path) -> int:
    """Bytes that can still be written to the disk that a path is on, or will be."""
    path = path.absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free
