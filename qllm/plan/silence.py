"""Libraries in C that print where results go."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_output() -> Iterator[None]:
    """Leave out what C prints on standard output: HiGHS prints some lines of its own there."""
    library = ctypes.CDLL(None)
    library.fflush(None)
    try:
        own = os.dup(1)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(own, 1)
        os.close(own)
        os.close(nowhere)
