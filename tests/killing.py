"""Runs that are killed at a point of their choosing, without the process that it would take."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qllm.checkpoint.writer import ShardWriter

# All that changes what is on the disk, or has to be there before it goes on.
CHANGES = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "fsync")


class Killed(BaseException):
    """The run ends here, as if by SIGKILL."""


@contextmanager
def killed_at(point: int) -> Iterator[list[str]]:
    """Let `point` changes of the disk happen; the next one kills, and none comes after it.

    Yields the changes that came.
    """
    came: list[str] = []

    def counting(name: str, change: Callable) -> Callable:
        def counted(*args, **options):
            if len(came) >= point:
                raise Killed
            came.append(name)
            return change(*args, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counting(name, getattr(os, name)))
        patch.setattr(ShardWriter, "write", counting("write", ShardWriter.write))
        yield came


def is_killed(run: Callable[[], object], point: int) -> bool:
    """Whether a run came as far as the point that it is killed at."""
    killed = False
    with killed_at(point):
        try:
            run()
        except Killed:
            killed = True
    # What a process holds is let go of when it ends; from Python 3.13 on the frames that an
    # exception left behind may be in a cycle.
    gc.collect(1)
    return killed


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
