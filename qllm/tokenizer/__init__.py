"""Text to token ids and back, as transformers has it; where its files allow, without transformers.

`qllm.tokenizer.direct` says which files do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from qllm.errors import UserError, first_line
from qllm.files import check_file
from qllm.gguf import is_gguf
from qllm.hub import TEMPLATES
from qllm.text import surrogate

# What decides a tokenizer's ids, with the model's config.json.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
# What transformers may read besides ends so.
SUFFIXES = (".json", ".txt", ".model", ".jinja")
MARK = b"\xef\xbb\xbf"
# What such a token is called where a decoder joins those that follow each other ("byte fallback").
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class _Codec(Protocol):
    """
    Attributes:
        prefix_token_id: the id of BOS, or else of EOS; None where the files name neither.
    """

    prefix_token_id: int | None

    def encode(self, text: str, max_length: int | None) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token(self, number: int) -> str | None: ...
    def definition(self) -> str: ...


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        prefix_token_id: the special token that stands for what comes before a text: the one named
            `bos`, else `eos`; None where the files name neither, or one that the model lacks.
        added_bos_id: the special token that `encode` puts in front of every text; None where it
            puts none.
        prefix: all that it puts in front, of which that is the first.
        tail: the one that it puts behind every text, likewise.
    """

    def __init__(self, codec: _Codec, vocab_size: int | None = None) -> None:
        self._codec, self._vocab_size = codec, vocab_size
        begin = codec.prefix_token_id
        self.prefix_token_id = None if begin is not None and self._beyond(begin) else begin
        empty, other = codec.encode("", None), codec.encode("a b", None)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(empty, other, strict=False))
        self.prefix = tuple(number for number, _ in same)
        self.added_bos_id = self.prefix[0] if self.prefix else None
        self.tail = empty[-1] if empty and empty[-1] == other[-1] else None

    @classmethod
    def load(cls, folder: Path, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of a checkpoint folder, or of a GGUF file.

        Args:
            vocab_size: rows of the model's embedding. The tokenizer may have ids beyond it, as
                files with added tokens do; a text that becomes one cannot be encoded.

        Raises:
            UserError: where there is none, or it is broken.
        """
        if is_gguf(folder):
            from qllm.gguf.tokenizer import load

            with _failures(f"{folder}: the tokenizer cannot be read"), _quiet():
                return cls(load(folder), vocab_size)
        from qllm.tokenizer import direct

        _check_files(folder)
        with _failures(f"{folder}: the tokenizer cannot be read"), _readable(folder) as readable:
            with _quiet():
                codec = direct.load(readable)
            whole: _Codec = codec or _TransformersCodec(readable)
            with _quiet():
                return cls(whole, vocab_size)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of a prompt, with the special tokens its model expects.

        Args:
            max_length: a longer prompt loses its beginning, but not its special tokens.

        Raises:
            UserError: for a text that is not Unicode, or that becomes a token which the model
                does not have.
        """
        ids = self._encode(text, max_length)
        largest = max(ids, default=0)
        if self._vocab_size is not None and self._beyond(largest):
            raise UserError(
                f"the text becomes token {largest}, {self._codec.token(largest)!r}, and the "
                f"model's vocabulary ends at {self._vocab_size - 1}; leave that token out, or "
                "take the tokenizer that belongs to the model"
            )
        return ids

    def encode_open(self, text: str) -> list[int]:
        """Token ids of a text that something follows: `encode` without the token behind it."""
        ids = self.encode(text)
        return ids if self.tail is None else ids[:-1]

    def find_special(self, text: str) -> tuple[int, str] | None:
        """The first special token that a text holds: its id, and how it is written."""
        for number in self._encode(text, None):
            token = self._codec.token(number)
            if token and token in text and not self.decode([number]):
                return number, token
        return None

    def count(self, text: str) -> int:
        """How many tokens a text has, whether the model knows them or not."""
        return len(self._encode(text, None))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        with _failures("the tokenizer cannot decode its tokens"):
            return self._codec.decode(ids)

    def is_byte(self, number: int) -> bool:
        """Whether a token stands for one byte, for which its vocabulary has no character."""
        token = self._codec.token(number)
        return token is not None and BYTE.fullmatch(token) is not None

    def continuation(self, prompt: Sequence[int], ids: list[int]) -> str:
        """Text that `ids` add to a prompt; spaces between the two belong to it."""
        before = self.decode(list(prompt))
        whole = self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def definition(self) -> str:
        """What tokenizer.json says of it, whichever files it was made from.

        Raises:
            UserError: for one that is not of the `tokenizers` library.
        """
        return self._codec.definition()

    def _encode(self, text: str, max_length: int | None) -> list[int]:
        if (half := surrogate(text)) is not None:
            raise UserError(f"the text holds {half}, half a surrogate pair: it is not Unicode")
        with _failures("the tokenizer cannot encode the text"):
            return self._codec.encode(text, max_length)

    def _beyond(self, number: int) -> bool:
        return self._vocab_size is not None and number >= self._vocab_size


class _TransformersCodec:
    """transformers' own."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        tokenizer.truncation_side = "left"
        self._tokenizer = tokenizer
        begin = tokenizer.bos_token_id
        self.prefix_token_id = tokenizer.eos_token_id if begin is None else begin

    def encode(self, text: str, max_length: int | None) -> list[int]:
        truncation = max_length is not None
        return self._tokenizer(text, truncation=truncation, max_length=max_length)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)  # of one text
        return text

    def token(self, number: int) -> str | None:
        token = self._tokenizer.convert_ids_to_tokens(number)
        assert not isinstance(token, list)  # of one number
        return token

    def definition(self) -> str:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            kind = type(self._tokenizer).__name__
            raise UserError(f"the tokenizer, a {kind}, is none of those that tokenizer.json holds")
        return backend.to_str()


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Make a user's error of whatever the libraries raise for a tokenizer that is broken."""
    try:
        yield
    except (UserError, MemoryError, ModuleNotFoundError):
        raise
    except BaseException as error:
        # A panic of Rust code is no Exception, so that nobody catches it; no module has its class.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} ({first_line(error)})") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a panic's own lines, which come before any exception, from standard error."""
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _check_files(folder: Path) -> None:
    def has(*names: str) -> bool:
        return all((folder / name).exists() for name in names)

    if not (has("tokenizer.json") or has("vocab.json", "merges.txt") or has("tokenizer.model")):
        hint = ""
        if has("tekken.json"):
            hint = "; tekken.json is not read: put tokenizer.json of another release beside it"
        raise UserError(
            f"{folder} has no tokenizer: neither tokenizer.json, vocab.json with merges.txt, "
            f"nor tokenizer.model{hint}"
        )
    # transformers opens templates, too.
    for path in (*map(folder.joinpath, FILES), *folder.glob("*.jinja"), *folder.glob(TEMPLATES)):
        if path.exists():
            check_file(path)


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """The folder, or a copy of its small files that the libraries can read.

    They take no byte-order marks, and no path that is not UTF-8.
    """
    files = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]
    marked = set()
    for path in files:
        with path.open("rb") as file:
            if file.read(len(MARK)) == MARK:
                marked.add(path)
    if not marked and os.fsencode(folder) == str(folder).encode(errors="replace"):
        yield folder
        return
    with TemporaryDirectory() as name:
        for path in files:
            copy = Path(name) / path.name
            if path in marked:
                copy.write_bytes(path.read_bytes().removeprefix(MARK))
            else:
                copy.symlink_to(path.resolve())
        yield Path(name)
