"""Prompts and stop strings as a caller gives them, one or several, of any kind that will do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from qllm.errors import UserError
from qllm.pretrained import Prompt
from qllm.text import surrogate

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def several(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several, as several.

    Raises:
        TypeError: for what is neither.
    """
    if hasattr(prompts, "tolist"):  # an array, or a tensor
        prompts = prompts.tolist()
    if isinstance(prompts, str) or _is_ids(prompts):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | Mapping) or not isinstance(prompts, Iterable):
        kind = type(prompts).__name__
        raise TypeError(f"prompts are texts or sequences of token ids, not {kind}")
    return list(prompts)


def _is_ids(prompts: object) -> TypeIs[Sequence[int]]:
    """Whether this is one prompt of token ids, and no list of prompts."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        return False
    return len(prompts) > 0 and isinstance(prompts[0], Integral)


def stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """Strings that end a text, however they were given.

    Raises:
        UserError: for an empty one, or one that is not UTF-8.
        TypeError: for what is no text.
    """
    if not isinstance(stop, str | Iterable | None):
        raise TypeError(f"stop is a text or several, not {type(stop).__name__}")
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"a stop string is a text, not {type(string).__name__}")
        if surrogate(string) is not None:
            raise UserError(f"the stop string {string!r} is not UTF-8 text")
    if "" in strings:
        raise UserError("a stop string is empty; give it some text")
    return strings
