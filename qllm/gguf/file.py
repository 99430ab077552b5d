"""A GGUF file's header: its metadata, and what it says of its tensors.

Files from outside are hostile. The header is walked with every length confirmed by the file before
anything is made of it; tensors have known types, whole blocks, and bytes of their own inside the
file. (The `gguf` package's reader trusts all of these, and takes seconds for a vocabulary.)
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path

from qllm.errors import UserError
from qllm.files import check_file
from qllm.gguf.types import OTHER_TYPES, TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
# Of a header; a vocabulary of 256,000 tokens and its merges takes 16 MB.
MAX_HEADER_BYTES = 256 << 20
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 4
MAX_SPLITS = 10_000
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)

# The types of metadata, as `struct` has them; the string, the array and what else they are.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9

Value = bool | int | float | str | list


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        shape: rows first, as torch has it; the file has it the other way round.
        offset: of its first byte in the file.
        nbytes: that it has there.
    """

    path: Path
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class GGUF:
    """What one file, or several that are one model, hold; equal to itself alone.

    Attributes:
        path: the file, or the first of them.
        metadata: by key.
        tensors: by name.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return sorted({self.path, *(tensor.path for tensor in self.tensors.values())})


def read_gguf(path: Path) -> GGUF:
    """The header of a file, or of all files of a model that was split.

    Raises:
        UserError: for a file that is none, is not whole, or holds what cannot be.
    """
    try:
        check_file(path)
        found = _read(path, _state(path))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    count = found.metadata.get("split.count", 1)
    if count == 1:
        return found
    match = SPLIT_NAME.fullmatch(path.name)
    if not isinstance(count, int) or not 1 <= count <= MAX_SPLITS or match is None:
        raise UserError(
            f"{path} is one of {count!r} files; they are to have names such as "
            "model-00001-of-00002.gguf"
        )
    if int(match[3]) != count:
        raise UserError(f"{path} says that it is one of {count} files; its name says {match[3]}")
    parts = [path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise UserError(f"{path.parent} lacks {missing[0]}, one of {count} files of the model")
    whole = GGUF(parts[0], {})
    for number, part in enumerate(parts):
        check_file(part)
        piece = _read(part, _state(part))
        if piece.metadata.get("split.no") != number or piece.metadata.get("split.count") != count:
            raise UserError(f"{part} does not say that it is file {number + 1} of {count}")
        for name, tensor in piece.tensors.items():
            if name in whole.tensors:
                raise UserError(f"{part} holds {name}, as {whole.tensors[name].path.name} does")
            whole.tensors[name] = tensor
        whole.metadata.update(piece.metadata if number == 0 else {})
    return whole


def _state(path: Path) -> tuple[int, int]:
    """What tells whether a file was changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)
def _read(path: Path, state: tuple[int, int]) -> GGUF:
    """One file's header; a run asks several times: for its configuration, tokenizer and tensors."""
    if state[0] < len(MAGIC):
        raise UserError(f"{path} is no GGUF file: it has {state[0]} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return _Header(path, data).read()


class _Header:
    """Walks a header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0
        self.end = min(len(data), MAX_HEADER_BYTES)

    def read(self) -> GGUF:
        if self._take(4) != MAGIC:
            raise UserError(f"{self.path} is no GGUF file: it does not begin with GGUF")
        version = self._u32()
        if version not in VERSIONS:
            other = version and version & 0xFFFF == 0
            what = "of a big-endian machine" if other else f"of version {version}"
            raise UserError(f"{self.path} is a GGUF file {what}; QLLM reads little-endian 2 and 3")
        tensors, pairs = self._u64(), self._u64()
        # A key has 8 bytes and more, its value 5; a tensor's name, shape, type and place 32.
        self._confirm(13 * pairs + 32 * tensors, f"{pairs} keys and {tensors} tensors")
        metadata: dict[str, Value] = {}
        for _ in range(pairs):
            key = self._text("a key", MAX_NAME_BYTES)
            if key in metadata:
                raise UserError(f"{self.path} has the key {key!r} twice")
            metadata[key] = self._value(self._u32(), key)
        found = GGUF(self.path, metadata)
        stated = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise UserError(f"{self.path}: general.alignment is {alignment!r}, expected 32")
        start = -(-self.at // alignment) * alignment
        ends = [(start, "the header")]
        for name, shape, kind, offset in sorted(stated, key=lambda tensor: tensor[3]):
            nbytes = prod(shape) // kind.values * kind.nbytes
            end, before = ends[-1]
            where = f"{self.path}: {name}, {kind.name} {list(shape)},"
            if offset % alignment:
                raise UserError(f"{where} begins at {offset}, which {alignment} does not divide")
            if start + offset < end:
                raise UserError(f"{where} begins inside {before}")
            if start + offset + nbytes > len(self.data):
                raise UserError(
                    f"{where} ends at byte {start + offset + nbytes}, the file at "
                    f"{len(self.data)}; get it again"
                )
            if name in found.tensors:
                raise UserError(f"{self.path} holds {name} twice")
            found.tensors[name] = GGUFTensor(self.path, shape, kind, start + offset, nbytes)
            ends.append((start + offset + nbytes, name))
        return found

    def _confirm(self, count: int, what: str) -> None:
        """Refuse what would lie beyond the end of the file, or of any header."""
        if count > self.end - self.at:
            raise UserError(
                f"{self.path} is no whole GGUF file: {what} would end beyond byte {self.end}"
            )

    def _take(self, count: int, what: str = "the header") -> bytes:
        self._confirm(count, what)
        self.at += count
        return self.data[self.at - count : self.at]

    def _number(self, letter: str) -> bool | int | float:
        """The next number, of a type that `struct` has by this letter."""
        size = struct.calcsize(f"<{letter}")
        return struct.unpack(f"<{letter}", self._take(size))[0]

    def _u32(self) -> int:
        return int(self._number("I"))

    def _u64(self) -> int:
        return int(self._number("Q"))

    def _text(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self._u64()
        if length > max_bytes:
            raise UserError(f"{self.path}: {what} has {length} bytes")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {what} is no UTF-8") from None

    def _value(self, kind: int, key: str) -> Value:
        what = f"the value of {key!r}"
        if kind == STRING:
            return self._text(what)
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind != ARRAY:
            raise UserError(f"{self.path}: {what} has the type {kind}, which GGUF does not have")
        inner, count = self._u32(), self._u64()
        if inner in NUMBERS:
            letter = NUMBERS[inner]
            size = struct.calcsize(f"<{letter}")
            data = self._take(count * size, what)
            return list(struct.unpack(f"<{count}{letter}", data))
        if inner != STRING:
            raise UserError(f"{self.path}: {what} is an array of the type {inner}")
        self._confirm(8 * count, what)
        return self._texts(count, what)

    def _texts(self, count: int, what: str) -> list[str]:
        """As many strings, a vocabulary perhaps."""
        data, at, end, found = self.data, self.at, self.end, []
        length_of = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                if end - at < 8:
                    break
                start = at + 8
                at = start + length_of(data, at)[0]
                if at > end:
                    break
                found.append(data[start:at].decode())
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: a text in {what} is no UTF-8") from None
        if len(found) < count:
            raise UserError(f"{self.path} is no whole GGUF file: {what} ends beyond its end")
        self.at = at
        return found

    def _tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self._text("a tensor's name", MAX_NAME_BYTES)
        dimensions = self._u32()
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise UserError(f"{self.path}: {name} has {dimensions} dimensions")
        shape = tuple(self._u64() for _ in range(dimensions))[::-1]
        kind, offset = self._u32(), self._u64()
        if kind not in TYPES:
            known = ", ".join(each.name for each in TYPES.values())
            found = OTHER_TYPES.get(kind, kind)
            raise UserError(f"{self.path}: {name} has the type {found}; QLLM reads {known}")
        if 0 in shape or shape[-1] % TYPES[kind].values:
            raise UserError(
                f"{self.path}: {name} has the shape {list(shape)}; {TYPES[kind].name} has "
                f"{TYPES[kind].values} values to a block"
            )
        if len(shape) < 2 and TYPES[kind].dtype is None:
            raise UserError(
                f"{self.path}: {name} has the shape {list(shape)} and the type "
                f"{TYPES[kind].name}, which matrices have"
            )
        return name, shape, TYPES[kind], offset
