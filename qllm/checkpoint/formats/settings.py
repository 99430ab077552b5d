"""A `quantization_config` of a config.json: its values, checked, and the rules they come to.

Modules have their Hugging Face names. A name decides alone: that a module is a linear layer at all,
and that the file has its tensors, is for the caller to know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qllm.checkpoint.formats.base import Finder, Format
from qllm.errors import UserError
from qllm.patterns import Patterns

Test = Callable[[str], bool]

# Entries of a list or an object of rules; the largest models have some thousand linears.
MAX_ENTRIES = 10_000
# Values of an option that is not used.
UNSET: tuple[Any, ...] = (None, False, {}, [], "")


@dataclass(frozen=True)
class QuantizationConfig:
    """A `quantization_config`, read.

    Attributes:
        rules: pairs of a test of a module's name and what the modules that pass it are; the first
            one decides. None is a module at 16 bits.
        default: what the modules are that no rule names.
        floats: finds the matrices of small floats, which are at 16 bits for the rules.
    """

    rules: tuple[tuple[Test, Format | None], ...]
    default: Format | None
    floats: Finder | None = None

    @property
    def packs(self) -> bool:
        """Whether modules may be stored as integers, which layers have as they are."""
        return any(storage is not None for _, storage in (*self.rules, (None, self.default)))

    def find(self, module: str) -> Format | None:
        """How a module, such as "model.layers.0.self_attn.q_proj", is stored; None at 16 bits.

        Raises:
            UserError: for a regular expression that takes too long.
        """
        for test, storage in self.rules:
            if test(module):
                return storage
        return self.default

    def of_names(self, names: Callable[[str], Sequence[str]]) -> QuantizationConfig:
        """The same for modules of other names, of which the settings have one or another."""

        def any_of(test: Test) -> Test:
            return lambda module: any(map(test, names(module)))

        return replace(self, rules=tuple((any_of(test), each) for test, each in self.rules))


class Fields:
    """A JSON object, each of whose values is checked as it is taken."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {short(value)}, expected a JSON object")
        self.value: dict[str, Any] = value
        self.where = where
        self._patterns = Patterns(where)

    def error(self, found: str, reads: str) -> UserError:
        return UserError(f"{self.where} has {found}; {reads}")

    def get(self, *names: str) -> Any:
        """The value of the first of these names that is there, None without one."""
        return next((self.value[name] for name in names if self.value.get(name) is not None), None)

    def text(self, *names: str, default: str | None = None) -> str:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(f"{names[0]} {short(value)}", "expected a text")
        return value

    def number(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names)
        if value is None and default is not None:
            return default
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value):
            return int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"{names[0]} {short(value)}", "expected a whole number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{name} {short(value)}", "expected true or false")
        return value

    def group_size(self, *names: str, default: int | None = None) -> int:
        """A group size; a null is the whole channel where one may be left out."""
        if default is not None and any(name in self.value for name in names):
            default = -1
        value = self.number(*names, default=default)
        if value < 1 and value != -1:
            raise self.error(f"{names[0]} {value}", "expected 1 or more, or -1")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts; one of lists of texts is laid flat."""
        values = self.get(name)
        if values is None:
            return []
        if isinstance(values, list):
            flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
            if all(isinstance(v, str) for v in flat):
                return self.few(name, flat)
        raise self.error(f"{name} {short(values)}", "expected a list of texts")

    def objects(self, name: str) -> dict[str, Fields]:
        """An object of objects."""
        value = self.value.get(name)
        fields = Fields({} if value in UNSET else value, f"{self.where}.{name}")
        self.few(name, fields.value)
        return {key: Fields(v, f"{fields.where}[{short(key)}]") for key, v in fields.value.items()}

    def few(self, name: str, values: Any) -> Any:
        """The values of an entry, each of which is to be compared with every module's name."""
        if len(values) > MAX_ENTRIES:
            raise self.error(f"{len(values)} entries in {name}", f"QLLM reads up to {MAX_ENTRIES}")
        return values

    def one_of(self, name: str, value: Any, choices: tuple[object, ...]) -> None:
        """Refuse a value that is none of those QLLM reads."""
        if value not in choices:
            listed = " or ".join(short(choice) for choice in choices)
            raise self.error(f"{name} {short(value)}", f"QLLM reads {listed}")

    def unset(self, *names: str) -> None:
        """Refuse what would change the result and QLLM does not do."""
        for name in names:
            if self.value.get(name) not in UNSET:
                found = f"{name} {short(self.value[name])}"
                raise self.error(found, f"QLLM reads checkpoints without {name}")

    def pattern(self, regex: str) -> Test:
        """Whether a name begins with what a regular expression matches."""
        self._patterns.compile(regex)
        return lambda name: self._patterns.match(regex, name)

    def search(self, regex: str) -> Test:
        """Whether a regular expression is found in a name."""
        self._patterns.compile(regex)
        return lambda name: self._patterns.search(regex, name)


def has_any(parts: Sequence[str]) -> Test:
    """Whether one of these is in a name."""
    return lambda name: any(part in name for part in parts)


def short(value: Any) -> str:
    """A value from a file, on one line of bounded length."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
