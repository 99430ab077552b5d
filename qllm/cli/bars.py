"""How far long work is: a bar where standard error is a terminal, else a note every half minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from qllm.cli.console import note, one_line
from qllm.progress import Meter

# Between two notes, where there is no terminal for a bar.
NOTE_SECONDS = 30.0


def progress(what: str) -> Callable[[list], Iterable]:
    """Wraps a list of items and shows how many of them are done."""

    def wrap(items: list) -> Iterator:
        with _shown(what, len(items), 0, "it") as add:
            for item in items:
                yield item
                add(1)

    return wrap


def meter(what: str) -> Meter:
    """Shows how many bytes are done, and when all will be."""
    return lambda total, done: _shown(what, total, done, "B")


def note_above(line: str) -> None:
    """Say something on standard error while a bar may be there."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        note(line)


@contextmanager
def _shown(what: str, total: int, done: int, unit: str) -> Iterator[Callable[[float], object]]:
    from tqdm import tqdm

    bar = tqdm(
        desc=one_line(what),
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        leave=False,
        disable=None,  # where there is no terminal
    )
    if not bar.disable:
        with bar:
            yield bar.update
        return
    count, start, ended = float(done), time.monotonic(), threading.Event()

    def add(more: float) -> None:
        nonlocal count
        count += more

    def speak() -> None:
        # In a thread of its own: what is counted may take longer than from one note to the next.
        while not ended.wait(NOTE_SECONDS):
            seconds = time.monotonic() - start
            note(
                f"{what}: {_so_far(count, total, unit)}{_left(count - done, total - done, seconds)}"
            )

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield add
    finally:
        ended.set()
        thread.join()


def _so_far(count: float, total: int, unit: str) -> str:
    if unit == "B":
        return f"{count / 1e6:.0f} of {total / 1e6:.0f} MB"
    return f"{count:.0f} of {total}"


def _left(count: float, total: int, seconds: float) -> str:
    """What is left of `total` where `count` of it took some seconds."""
    if not count:
        return ""
    left = seconds * max(total - count, 0.0) / count
    return f", about {left:.0f} s left" if left < 100 else f", about {left / 60:.0f} min left"
