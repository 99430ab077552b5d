"""The one exception that stands for a mistake in what was given, rather than in QLLM."""

from __future__ import annotations


class UserError(ValueError):
    """Something given (an option, a file, a shape) cannot work.

    The message is one line which says what was given and what would work. It names parameters in
    backticks, as the notes that a `note` is called with do; `qllm.cli` says their options instead.
    A library caller catches it, or `ValueError`; the scripts print it and exit with status 2.
    """


class WritingError(UserError, OSError):
    """Something cannot be written: the disk is full or read-only, or what is named cannot be."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
