"""Files from outside: what is opened is a regular file, what is read whole has a bound."""

from __future__ import annotations

import json
import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from qllm.errors import UserError

# Of a JSON file. Its values take up to thirty times its bytes; a config.json has some thousand.
MAX_JSON_BYTES = 4 << 20
LFS_HEAD = b"version https://git-lfs"

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, to read from.

    A named pipe would wait for its writer for good, and a device may have no end.

    Raises:
        FileNotFoundError: there is none.
        UserError: for what is no regular file, may not be read, or is a Git LFS pointer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason})") from None
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(_mode(descriptor)) else None
    if file is None:
        kind = KINDS.get(stat.S_IFMT(_mode(descriptor)), "no regular file")
        os.close(descriptor)
        raise UserError(f"{path} is {kind}; give a file")
    if file.peek(len(LFS_HEAD))[: len(LFS_HEAD)] == LFS_HEAD:
        file.close()
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` where it came "
            "from"
        )
    return file


def _mode(descriptor: int) -> int:
    return os.fstat(descriptor).st_mode


def check_file(path: Path) -> None:
    """Refuse what `open_file` would not open, before a library opens it by its name.

    Raises:
        FileNotFoundError, UserError: as `open_file`.
    """
    open_file(path).close()


def copy_file(source: Path, target: Path) -> None:
    """Copy what is in a regular file.

    Raises:
        FileNotFoundError, UserError: as `open_file`.
    """
    with open_file(source) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """All of a file.

    Raises:
        FileNotFoundError, UserError: as `open_file`, or for a file of more than `max_bytes`.
    """
    with open_file(path) as file:
        try:
            data = file.read(max_bytes + 1) or b""  # some files of the system give None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if len(data) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes >> 20} MB, which no file of its kind has")
    return data


def parse_json(data: bytes | str, where: str) -> Any:
    """A JSON value.

    Args:
        where: what it is from, for messages.

    Raises:
        UserError: for what is no JSON, no UTF-8, nested too deeply, or holds a number too long.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON ({error})") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError, UserError: as `read_bytes` and `parse_json`, or for another value.
    """
    value = parse_json(read_bytes(path, max_bytes), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def portable(path: Path) -> Path:
    """A path by which libraries in other languages find a file or folder that is there.

    They take the characters of a path for UTF-8. Where its bytes are not those, in a locale of
    another encoding or in none, it is opened, and reached by its number until the process ends.
    """
    if os.fsencode(path) == str(path).encode("utf-8", "surrogatepass"):
        return path
    return Path(f"/proc/self/fd/{os.open(path, os.O_RDONLY | os.O_CLOEXEC)}")


def readable(text: str) -> str:
    """A file's name as text that can be written: what is not UTF-8 in it becomes U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
