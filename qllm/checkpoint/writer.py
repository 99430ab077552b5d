"""Write a safetensors file tensor by tensor, and folders and files that appear whole or not."""

from __future__ import annotations

import json
import os
import platform
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from qllm.checkpoint.reader import DTYPES, TensorInfo

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """A safetensors file whose tensors are known by shape first and written one by one, in order.

    The safetensors library writes a whole dictionary at once; a model larger than memory has none.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, info in tensors.items():
            start, end = end, end + info.dtype.itemsize * torch.Size(info.shape).numel()
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
        data = json.dumps(header, separators=(",", ":")).encode()
        data += b" " * (-len(data) % 64)  # tensors begin on a cache line of the mapped file
        self._pending = list(tensors.items())[::-1]
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(data) + 56) + data + b" " * 56)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        expected, info = self._pending.pop()
        assert (name, tensor.shape, tensor.dtype) == (expected, info.shape, info.dtype)
        if tensor.numel():
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            self._file.write(memoryview(data))

    def close(self) -> None:
        """Finish the file; every tensor has been written."""
        assert not self._pending
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, and is gone if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, in place of what was there, when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    mark = f".{path.name}.{platform.node()}.{os.getpid()}."
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=mark))
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=mark))
            path.rename(old / "old")
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Remove temporary folders of `path` whose process on this machine was killed."""
    start = f".{path.name}.{platform.node()}."
    for folder in path.parent.iterdir():
        process = folder.name.removeprefix(start).partition(".")[0]
        if folder.name.startswith(start) and process.isdecimal():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
            except PermissionError:
                pass  # it runs, for somebody else


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors that name no file, as a full disk's do not, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
