"""What a torch file is checked for before torch reads it: what it would unpack, and call."""

from __future__ import annotations

import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

from qllm.errors import UserError, first_line
from qllm.files import open_file

# Of the part that names tensors: some three hundred bytes for each.
MAX_PICKLE_BYTES = 2 << 20
# What torch.save calls for dense tensors and parameters. `weights_only` lets through more, of which
# some make objects of any size out of a few bytes.
CALLED = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch\.storage (Typed|Untyped)Storage|"
    r"torch\._utils (_rebuild_tensor|_rebuild_tensor_v[23]|_rebuild_parameter)|"
    r"torch (Size|(b?float|u?int|bool)\w*)"
)
# Before torch 1.6: magic number, version, system, tensors, keys; then the elements.
LEGACY_PICKLES = 5


def check_torch_file(path: Path) -> bool:
    """Refuse a file that torch would spend more on than it holds.

    Returns:
        whether it is a zip archive, as since torch 1.6.

    Raises:
        FileNotFoundError, UserError: as `open_file`, or for a broken file, one whose parts are
            compressed or overlap, or whose pickle calls anything but what makes tensors.
    """
    with open_file(path) as file:
        try:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                _check_pickles(file, LEGACY_PICKLES)
                return False
            with zipfile.ZipFile(file) as archive:
                _check_archive(archive, file.seek(0, 2))
        except Exception as error:  # the standard library raises anything for a broken file, too
            raise UserError(
                f"{path} is no whole torch checkpoint of tensors alone ({first_line(error)[:120]})"
            ) from None
    return True


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UserError("it is compressed, as torch.save makes none")
    if sum(record.file_size for record in records) > size:
        raise UserError("it holds parts of more bytes than its own")
    for record in records:
        if record.filename.endswith(".pkl"):
            if record.file_size > MAX_PICKLE_BYTES:
                raise UserError(f"{record.filename} is larger than {MAX_PICKLE_BYTES >> 20} MB")
            with archive.open(record) as file:
                _check_pickles(file, 1)


def _check_pickles(file: IO[bytes], count: int) -> None:
    """Read what some pickles would call, without calling it."""
    begin = file.tell()
    for _ in range(count):
        for operation, value, place in pickletools.genops(file):
            assert place is not None  # a file tells where it is
            if place - begin > MAX_PICKLE_BYTES:
                raise UserError(f"its pickle is larger than {MAX_PICKLE_BYTES >> 20} MB")
            called = operation.name in ("GLOBAL", "INST")
            if operation.name == "STACK_GLOBAL" or (called and not CALLED.fullmatch(str(value))):
                raise UserError(f"it names {value}")
