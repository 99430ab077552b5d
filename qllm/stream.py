"""Text that is written while it is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qllm.stopping import MARGIN, context, cut, settled
from qllm.tokenizer import Tokenizer


class TextStream:
    """Writes each prompt's text as its tokens come, one prompt after the other.

    All prompts are generated at once; the text of a later one waits until those before it are
    finished.

    Attributes:
        row: the prompt whose text is written now.
        text, read: what its first `read` new tokens add to it: they are not decoded again.
        written: what was written of that.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        begin: Callable[[int], None],
        write: Callable[[str], None],
        stop: Sequence[str] = (),
    ) -> None:
        """
        Args:
            begin: called with a row before its text comes.
            write: called with each piece of text.
            stop: strings that a text ends in front of.
        """
        self.tokenizer, self.prompts, self.stop = tokenizer, prompts, stop
        self.begin, self.write = begin, write
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)
        self.row, self.text, self.read, self.written = 0, "", 0, ""
        begin(0)

    def add(self, row: int, token: int, last: bool) -> None:
        """Take a new token in; what `generate` calls."""
        self.tokens[row].append(token)
        self.ended[row] = last
        while row == self.row:
            self._write()
            if not self.ended[row]:
                return
            self.row, self.text, self.read, self.written = row + 1, "", 0, ""
            if self.row < len(self.prompts):
                # Its tokens so far have waited for this row to end.
                row = self.row
                self.begin(row)

    def _write(self) -> None:
        tokens = self.tokens[self.row]
        before = context(self.tokenizer, self.prompts[self.row], tokens, self.read, MARGIN)
        text = self.text + self.tokenizer.continuation(before, tokens[self.read :])
        # A character whose bytes have not all come yet decodes to a replacement character, or to
        # nothing beside one that the prompt ends with.
        if text != self.text and not text.endswith("\ufffd"):
            self.text, self.read = text, len(tokens)
        ready = text if self.ended[self.row] else settled(text.rstrip("\ufffd"), self.stop)
        ready = cut(ready, self.stop)
        if ready.startswith(self.written):
            self.write(ready[len(self.written) :])
            self.written = ready
