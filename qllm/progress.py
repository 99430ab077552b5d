"""What long work says, how far it is and what to know of it, and which its caller shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

# Called with a line that whoever runs it should know.
Note = Callable[[str], object]
# Called with (all bytes, those done before); in the block, what it gives is called with bytes more.
Meter = Callable[[int, int], AbstractContextManager[Callable[[float], object]]]


def unseen(total: int, done: int) -> AbstractContextManager[Callable[[float], object]]:
    """A `Meter` that shows nothing."""
    return nullcontext(lambda count: None)


def silent(line: str) -> None:
    """A `Note` that says nothing: as the library by itself, and all processes of a run but one."""
