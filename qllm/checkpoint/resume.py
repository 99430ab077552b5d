"""A folder that takes long to make: a killed run leaves what it finished, and the next goes on.

Beside OUT, `OUT.partial` holds a journal, what the run needs to go on, and in `model/` what will
be OUT. The journal is replaced as a whole, after all that it speaks of is on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qllm.checkpoint.writer import new_file
from qllm.errors import UserError
from qllm.files import parse_json
from qllm.folders import check_new, partial_path, writing
from qllm.temporary import is_running

# Of the file that stands for a lock where the file system has none, and says whose it is.
MARK = "running-"
LONG = 100  # characters of a setting, of which a message has the beginning


class PartialFolder:
    """The place where a folder is made.

    Attributes:
        folder: for what the run needs to go on.
        model: what becomes the target.
        state: what the journal says, {} at the start; `commit` replaces it.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any]) -> None:
        """
        Args:
            settings: what decides the result, as JSON values; an interrupted run with other
                settings is left alone.

        Raises:
            UserError: for a target that is there, one that another process makes, or an
                interrupted run with other settings.
        """
        self.target = target
        self.settings = json.loads(json.dumps(settings))
        self._target = target.resolve()  # a link is not replaced, but what it leads to
        self.folder = partial_path(target)
        self.model = self.folder / "model"
        self._journal = self.folder / "journal.json"
        self.state: dict = {}
        self._check_target()
        with writing(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
        self._mark: Path | None = None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"another process is writing {target} now") from None
            self._mark_out()
        try:
            if self._journal.exists():
                self._read_journal()
            if not self.model.exists() and not self.finished:
                self.commit({})
                self.model.mkdir()
        except BaseException:
            self.close()
            raise

    def _mark_out(self) -> None:
        """A lock for file systems that have none: a file that names this process.

        It is written before others are looked for, so that of two at least one sees the other's.

        Raises:
            UserError: there is one of a process that runs, or of another machine.
        """
        self._mark = self.folder / f"{MARK}{platform.node()}-{os.getpid()}"
        self._mark.touch()
        for other in self.folder.glob(f"{MARK}*"):
            host, _, process = other.name.removeprefix(MARK).rpartition("-")
            if other == self._mark:
                continue
            if host == platform.node() and not is_running(int(process)):
                other.unlink(missing_ok=True)
                continue
            self.close()
            raise UserError(
                f"another process is writing {self.target} now, {process} on {host}; if that has "
                f"ended, remove {other}"
            )

    def _check_target(self) -> None:
        if self.target.exists() and not self.target.is_dir():
            raise UserError(f"{self.target} is a file; name a folder")
        if self._target in (Path.cwd(), *Path.cwd().parents):  # which would be moved away
            raise UserError(f"{self.target} is where you are; name another folder")
        if self.model.exists() or not self._journal.exists():
            if self._target_is_there():
                with suppress(OSError):  # it is empty where a run was killed when it was done
                    self.folder.rmdir()
            check_new(self.target)

    def _target_is_there(self) -> bool:
        return self.target.exists() and any(self.target.iterdir())

    def _read_journal(self) -> None:
        try:
            journal = parse_json(self._journal.read_bytes(), "it")
            found, self.state = dict(journal["settings"]), dict(journal["state"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._journal} cannot be read; remove {self.folder} to start anew"
            ) from None
        if not self.state:  # nothing was finished, and nothing is lost
            self.commit({})
            return
        for key in dict.fromkeys([*self.settings, *found]):
            ours, theirs = self.settings.get(key), found.get(key)
            if ours != theirs:
                what, ours, theirs = _first_difference(key, ours, theirs)
                raise UserError(
                    f"{self.folder} holds an interrupted run with {what} {_shorten(theirs)}, this "
                    f"one has {_shorten(ours)}; give that one's options to go on with it, or "
                    "remove the folder"
                )

    @property
    def finished(self) -> bool:
        """Whether the target is there, and only the rest of the work was not cleared away."""
        return not self.model.exists() and self._target_is_there()

    def commit(self, state: dict) -> None:
        """Make `state` what a later run finds; all that it speaks of is on the disk already."""
        with new_file(self._journal) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"settings": self.settings, "state": state}))
            file.flush()
            os.fsync(file.fileno())
        self.state = state

    def finish(self) -> None:
        """Move what was made to the target, and clear the rest away."""
        if not self.finished:
            self.model.rename(self._target)  # an empty folder may be there
        # The journal goes last: while it is there, a target without a model beside it is whole.
        for path in self.folder.iterdir():
            if path != self._journal:
                path.unlink()
        self._journal.unlink()
        self.folder.rmdir()
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._mark:
            self._mark.unlink(missing_ok=True)
        self._lock.close()


def _first_difference(key: str, ours: object, theirs: object) -> tuple[str, object, object]:
    """Of objects with many entries, the first that differs, its key behind theirs."""
    missing = object()
    while isinstance(ours, dict) and isinstance(theirs, dict):
        if len(json.dumps([ours, theirs])) < LONG:
            break
        keys = dict.fromkeys([*ours, *theirs])
        inner = next(k for k in keys if ours.get(k, missing) != theirs.get(k, missing))
        key, ours, theirs = f"{key} {inner}", ours.get(inner), theirs.get(inner)
    return key, ours, theirs


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < LONG else f"{text[:80]}…"
