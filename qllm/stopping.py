"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence

from qllm.errors import UserError
from qllm.tokenizer import Tokenizer

# Tokens that are decoded in front of those whose text is asked for: a first one alone may decode to
# something else than it does in its place.
MARGIN = 8


def context(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], end: int, count: int
) -> list[int]:
    """The last `count` tokens in front of new token `end`, and what they do not decode without.

    Bytes that stand next to each other are decoded together: without the first of them the others
    may be no characters.
    """

    def token(index: int) -> int:
        return prompt[index] if index < len(prompt) else tokens[index - len(prompt)]

    last = len(prompt) + end
    first = max(0, last - count)
    while 0 < first < last and tokenizer.is_byte(token(first)):
        first -= 1
    return [token(index) for index in range(first, last)]


class StopStrings:
    """Looks for strings in the texts that a batch of prompts gets.

    Attributes:
        strings: of which the first that comes ends a text, and is no part of it.
        special: ids of those that are special tokens, of which a text has nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], strings: Sequence[str]
    ) -> None:
        self.tokenizer, self.prompts, self.strings = tokenizer, prompts, tuple(strings)
        found = [tokenizer.find_special(string) for string in strings]
        pairs = zip(strings, found, strict=True)
        self.special = {each[0] for string, each in pairs if each and each[1] == string}
        self.tokens: list[list[int]] = [[] for _ in prompts]
        # A token may be one byte of a string.
        self.tail = max(len(string.encode()) for string in strings) + MARGIN

    def __call__(self, row: int, token: int) -> bool:
        """Whether a row's text ends with its next token."""
        tokens = self.tokens[row]
        tokens.append(token)
        if token in self.special:
            return True
        start = max(0, len(tokens) - self.tail)
        while start and self.tokenizer.is_byte(tokens[start]):
            start -= 1
        before = context(self.tokenizer, self.prompts[row], tokens, start, self.tail)
        text = self.tokenizer.continuation(before, tokens[start:])
        return any(string in text for string in self.strings)


def check_stops(tokenizer: Tokenizer, strings: Sequence[str]) -> None:
    """Refuse strings that can end no text.

    Raises:
        UserError: for one that holds a special token, and more.
    """
    for string in strings:
        if (found := tokenizer.find_special(string)) and found[1] != string:
            raise UserError(
                f"the stop string {string!r} holds the special token {found[1]!r}, of which a "
                "text has nothing; give that token alone"
            )


def cut(text: str, strings: Sequence[str]) -> str:
    """A text up to the first of the strings in it."""
    return text[: min((at for s in strings if (at := text.find(s)) >= 0), default=len(text))]


def settled(text: str, strings: Sequence[str]) -> str:
    """A text so far without what may turn out to be the beginning of one of the strings."""
    held = (
        size
        for string in strings
        for size in range(min(len(string) - 1, len(text)), 0, -1)
        if text.endswith(string[:size])
    )
    return text[: len(text) - max(held, default=0)]
