"""Text that users give: UTF-8, with or without a byte-order mark, whatever ends its lines."""

from __future__ import annotations

import codecs
from pathlib import Path

from qllm.errors import UserError

# Those of UTF-32 first: UTF-16's begins one of them.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


MAX_BYTES = 1 << 30  # of a text, which is in memory as a whole, several times over


def read_text(path: Path, option: str = "") -> str:
    """The text of a file, its lines ended by line feeds.

    Args:
        option: what named it, for errors.

    Raises:
        UserError: where it cannot be read, and see `decode`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{option}{path} cannot be read ({error.strerror})") from None
    return decode(data, f"{option}{path}")


def decode(data: bytes, name: str) -> str:
    """The text of what was read, its lines ended by line feeds.

    Args:
        name: of what was read, for errors.

    Raises:
        UserError: where it is not UTF-8, naming the line, or there is more than of a text.
    """
    if len(data) > MAX_BYTES:
        raise UserError(
            f"{name} has more than {MAX_BYTES >> 30} GiB; `head -c {MAX_BYTES >> 30}G` takes a part"
        )
    encoding = next((found for mark, found in MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data[:2]:  # no text begins so, but UTF-16 without its mark
        encoding = "UTF-16"
    if encoding is not None:
        raise UserError(
            f"{name} is {encoding}, and text is read as UTF-8; "
            f"`iconv -f {encoding} -t UTF-8` converts it"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} is not UTF-8 text: line {line} has the byte "
            f"0x{error.object[error.start]:02x}; save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def surrogate(text: str) -> str | None:
    """The first half of a surrogate pair that stands alone in a text, escaped; None without one.

    Such a half is no character: no encoding and no tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return repr(text[error.start])
    return None
