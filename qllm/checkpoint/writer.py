"""Write a safetensors file tensor by tensor, and folders and files that appear whole or not."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qllm.checkpoint.tensor_files import DTYPES
from qllm.checkpoint.tensors import TensorInfo
from qllm.folders import FULL, writing
from qllm.temporary import Temporary

WEIGHTS = "model.safetensors"
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__", {"format": "pt"}  # of shards


class SafetensorsWriter:
    """A safetensors file whose tensors are known by shape first and written one by one, in order.

    The safetensors library writes a whole dictionary at once; a model larger than memory has none.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, info in tensors.items():
            header[name] = _entry(info, end)
            _, end = header[name]["data_offsets"]
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
            self._file.write(_bytes(tensor.contiguous()))

    def close(self) -> None:
        """Finish the file; every tensor has been written."""
        assert not self._pending
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class ShardWriter:
    """Tensors appended to the shards of a checkpoint, by a run that may be killed and go on.

    While a shard grows its header is not known. Its capacity is reserved at the beginning, and what
    is not used of that is filled with spaces, as the format allows.
    """

    def __init__(
        self, folder: Path, *, limit: int, header_bytes: int, state: list[dict] | None = None
    ) -> None:
        """
        Args:
            folder: the shards' own; whatever `state` does not name is removed from it.
            limit: bytes of tensors per shard, unless one tensor has more.
            header_bytes: capacity of the header of a shard.
            state: what `sync` returned, to go on from there.
        """
        self.folder, self.limit = folder, limit
        self.header_capacity = -(-header_bytes // 4096) * 4096 - 8
        self.shards = [dict(shard) for shard in state or ()]
        folder.mkdir(exist_ok=True)
        for index in range(len(self.shards)):  # killed in `finish`, it may have its name already
            if (folder / self._name(index)).exists():
                (folder / self._name(index)).rename(self._path(index))
        known = {self._path(index).name for index in range(len(self.shards))}
        for path in folder.iterdir():
            if path.name not in known:
                path.unlink()
        self._file: BinaryIO | None = None
        entries = [METADATA, *(self.shards[-1].items() if self.shards else ())]
        self._header_bytes = sum(_entry_bytes(*each) for each in entries)  # of the last shard
        if self.shards:
            self._file = self._path(len(self.shards) - 1).open("r+b")
            self._file.seek(8 + self.header_capacity + self._end(self.shards[-1]))
            self._file.truncate()

    def _path(self, index: int) -> Path:
        return self.folder / f"shard-{index + 1:05}"

    def _name(self, index: int) -> str:
        count = len(self.shards)
        return f"model-{index + 1:05}-of-{count:05}.safetensors" if count > 1 else WEIGHTS

    @staticmethod
    def _end(shard: dict) -> int:
        last = next(reversed(shard.values()), None)  # entries stand in the order of their bytes
        return 0 if last is None else last["data_offsets"][1]

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; to a new shard where the last has no place for it or for its entry."""
        data = tensor.detach().cpu().contiguous()
        if not self._fits(name, data):
            with writing(self.folder, FULL):
                if self._file is not None:
                    self._flush()
                    self._file.close()
                self.shards.append({})
                self._header_bytes = _entry_bytes(*METADATA)
                self._file = self._path(len(self.shards) - 1).open("wb")
                self._file.write(b" " * (8 + self.header_capacity))
        assert self._file is not None  # there is one for the last shard
        start = self._end(self.shards[-1])
        if data.numel():
            with writing(self.folder, FULL):
                self._file.write(_bytes(data))
        self.shards[-1][name] = _entry(data, start)
        self._header_bytes += _entry_bytes(name, self.shards[-1][name])

    def _fits(self, name: str, data: Tensor) -> bool:
        """Whether the last shard takes a tensor."""
        if not self.shards:
            return False
        start = self._end(self.shards[-1])
        header = self._header_bytes + _entry_bytes(name, _entry(data, start))
        return start + data.nbytes <= self.limit and header <= self.header_capacity

    def overwrite(self, name: str, tensor: Tensor) -> None:
        """Put another tensor of the same shape and type in the place of one that was written."""
        index, entry = next(
            (i, shard[name]) for i, shard in enumerate(self.shards) if name in shard
        )
        assert (list(tensor.shape), DTYPE_NAMES[tensor.dtype]) == (entry["shape"], entry["dtype"])
        data = tensor.detach().cpu().contiguous()
        self.sync()
        with writing(self.folder, FULL), self._path(index).open("r+b") as file:
            file.seek(8 + self.header_capacity + entry["data_offsets"][0])
            file.write(_bytes(data))
            file.flush()
            os.fsync(file.fileno())

    def _flush(self) -> None:
        assert self._file is not None  # whoever calls this has looked
        self._file.flush()
        os.fsync(self._file.fileno())

    def sync(self) -> list[dict]:
        """Put what was written on the disk; returns what another writer needs to go on."""
        if self._file is not None:
            with writing(self.folder, FULL):
                self._flush()
        return self.shards

    def finish(self) -> int:
        """Complete the shards, give them their names, and write their index; bytes of tensors."""
        with writing(self.folder, FULL):
            return self._finish()

    def _finish(self) -> int:
        if self._file is not None:
            self._file.close()
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(self.shards):
            header = json.dumps(dict([METADATA, *shard.items()]), separators=(",", ":"))
            assert len(header) <= self.header_capacity  # as `write` has looked
            weight_map |= dict.fromkeys(shard, self._name(index))
            with self._path(index).open("r+b") as file:
                file.write(
                    struct.pack("<Q", self.header_capacity)
                    + header.encode().ljust(self.header_capacity)
                )
                file.flush()
                os.fsync(file.fileno())
            self._path(index).rename(self.folder / self._name(index))
        total = sum(map(self._end, self.shards))
        if len(self.shards) > 1:
            about = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(about, indent=2, sort_keys=True) + "\n"
            (self.folder / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")
        return total


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    # Of a single element any stride counts as contiguous, and views of bytes want 1.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def _entry(tensor: Tensor | TensorInfo, start: int) -> dict[str, Any]:
    """What a header says of a tensor that lies `start` bytes behind it."""
    shape = torch.Size(tensor.shape)
    end = start + tensor.dtype.itemsize * shape.numel()
    return {
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(shape),
        "data_offsets": [start, end],
    }


def _entry_bytes(name: str, entry: object) -> int:
    """What an entry takes in a header, with the comma or the braces around it."""
    return len(json.dumps({name: entry}, separators=(",", ":")))


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, and is gone if it fails."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Temporary(path)
    try:
        with writing(path, FULL):
            yield temporary.path
        with writing(path):
            temporary.path.chmod(0o666 & ~_umask())
            temporary.path.replace(path)
    except BaseException:
        temporary.remove()
        raise
    finally:
        temporary.close()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, which appears when it is whole."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path`, in place of what was there, when the block ends."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Temporary(path, folder=True)
    try:
        with writing(path, FULL):
            yield temporary.path
        temporary.path.chmod(0o777 & ~_umask())
        if path.exists():
            old = Temporary(path, folder=True)
            path.rename(old.path / "old")
            temporary.path.rename(path)
            old.remove()
            old.close()
        else:
            temporary.path.rename(path)
    except BaseException:
        temporary.remove()
        raise
    finally:
        temporary.close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
