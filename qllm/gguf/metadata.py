"""Metadata with checked access: keys of one architecture, and what is the same in all files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from qllm.errors import UserError
from qllm.gguf.file import GGUF, Value

LONGEST_SHOWN = 60
Kind = TypeVar("Kind", bool, int, float, str, list)


class Metadata:
    """A file's metadata.

    Attributes:
        where: the file, for messages.
        architecture: what it says it is.
    """

    def __init__(self, found: GGUF) -> None:
        """
        Raises:
            UserError: for a file that does not say what it is.
        """
        self.values, self.where = found.metadata, str(found.path)
        self.architecture = self.text("general.architecture")

    def own(self, key: str) -> str:
        """A key of the architecture: "block_count" to "llama.block_count"."""
        return f"{self.architecture}.{key}"

    def get(self, key: str, kind: type[Kind], default: Kind | None = None) -> Kind:
        """The value of a key, of a type; `default` without one.

        Raises:
            UserError: for a value of another type, or where there is none and no default.
        """
        value = self.values.get(key, default)
        odd = isinstance(value, bool) and kind is not bool
        if value is None or odd or not isinstance(value, kind):
            raise self._refusal(key, value)
        return value

    def _refusal(self, key: str, value: Value | None) -> UserError:
        """What is said of a value of another type than its key has, or of none."""
        said = "has no" if value is None else f"says {repr(value)[:LONGEST_SHOWN]} of"
        return UserError(f"{self.where} {said} {key}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self.get(key, str, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number; a list of one for each layer, all the same, is one, too."""
        value = self.values.get(key)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        elif isinstance(value, list):
            raise UserError(f"{self.where}: {key} differs between layers, which QLLM has not")
        if value is None:
            return self.get(key, int, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{self.where} says {value!r} of {key}; expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refusal(key, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return self.get(key, bool, default)

    def texts(self, key: str, default: Sequence[str] | None = None) -> list[str]:
        """A list of strings."""
        value = self.get(key, list, None if default is None else list(default))
        if value and not isinstance(value[0], str):  # arrays are of one type
            raise UserError(f"{self.where}: {key} is no list of texts")
        return value

    def numbers(self, key: str, default: Sequence[float] | None = None) -> list[int | float]:
        """A list of numbers."""
        value = self.get(key, list, None if default is None else list(default))
        if value and (isinstance(value[0], bool) or not isinstance(value[0], int | float)):
            raise UserError(f"{self.where}: {key} is no list of numbers")
        return value
