"""Regular expressions from files, some of which were made to take forever."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from qllm.errors import UserError

# What a plan's or a checkpoint's expressions may take all together, in seconds of the processor.
SECONDS = 2.0
MAX_CHARACTERS = 10_000
# `regex` writes counted repetitions out, those inside of others too.
MAX_REPETITIONS = 10_000
COUNTED = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
# An expression that is found in names of one layer alone, whatever comes behind. A plan has some
# for each layer, and a layer of experts hundreds of names: all in all would take too long.
OF_LAYER = re.compile(r"\^(layers)\\\.(\d+)\\\.(?![*+?{])[^|]*")


class ByLayer:
    """Which of some expressions may be found in a name, by the layer that they begin with."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._of_any: list[int] = []
        self._of_layer: dict[str, list[int]] = {}
        for index, pattern in enumerate(patterns):
            found = OF_LAYER.fullmatch(pattern)
            # Flags may change what an expression means from its beginning on.
            if found is None or "(?" in pattern:
                self._of_any.append(index)
            else:
                self._of_layer.setdefault(".".join(found.groups()), []).append(index)

    def places(self, name: str) -> list[int]:
        """Where those that may be found in a name are."""
        own = self._of_layer.get(".".join(name.split(".", 2)[:2]), [])
        return sorted(self._of_any + own)


class Patterns:
    """Looks names up in the regular expressions of one file, within SECONDS.

    The syntax is that of `re`; the engine is `regex`, which can be told when to stop.
    """

    def __init__(self, where: str) -> None:
        """
        Args:
            where: what they are from, for messages.
        """
        self.where, self._left = where, SECONDS
        self._compiled: dict[str, Any] = {}

    def compile(self, pattern: str) -> None:
        """Refuse what is no regular expression.

        Raises:
            UserError: for one that is none, too long, or too large once its counts are written out.
        """
        self._run(pattern, lambda compiled: None)

    def search(self, pattern: str, name: str) -> bool:
        """Whether an expression is found in a name.

        Raises:
            UserError: as `compile`, or when the time is up.
        """
        return self._run(pattern, lambda compiled: compiled.search(name, timeout=self._left))

    def match(self, pattern: str, name: str) -> bool:
        """Whether a name begins with what an expression matches; errors are those of `search`."""
        return self._run(pattern, lambda compiled: compiled.match(name, timeout=self._left))

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether an expression matches a whole name; errors are those of `search`."""
        return self._run(pattern, lambda compiled: compiled.fullmatch(name, timeout=self._left))

    def _run(self, pattern: str, look: Callable) -> bool:
        import regex

        start = time.thread_time()
        try:
            if pattern not in self._compiled:
                self._compiled[pattern] = regex.compile(_bounded(pattern))
            found = look(self._compiled[pattern]) is not None
        except TimeoutError:
            self._left = 0.0
        except (regex.error, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{self.where}: {_short(pattern)} is no regular expression ({error})"
            ) from None
        else:
            self._left -= time.thread_time() - start
        if self._left <= 0:
            raise UserError(
                f"{self.where}: matching its regular expressions takes too long, at "
                f"{_short(pattern)}; write fewer, and no repetitions inside of repetitions"
            )
        return found


def _bounded(pattern: str) -> str:
    if len(pattern) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS:,} characters")
    counts = [max(int(n or 1) for n in pair) for pair in COUNTED.findall(pattern)]
    if math.prod(count or 1 for count in counts) > MAX_REPETITIONS:
        raise ValueError(f"its counts come to more than {MAX_REPETITIONS:,} repetitions")
    return pattern


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
