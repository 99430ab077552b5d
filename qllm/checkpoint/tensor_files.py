"""Files of weights: safetensors and torch's own, each tensor read by itself.

Files from outside are hostile: headers are checked by the safetensors library before they are
used, pickles are loaded with `weights_only=True`.
"""

from __future__ import annotations

import gc
import io
import os
import struct
import warnings
from pathlib import Path

import torch
from torch import Tensor

from qllm.checkpoint.pickles import check_torch_file
from qllm.checkpoint.tensors import TensorFile, TensorInfo, map_file
from qllm.errors import UserError, first_line
from qllm.files import open_file, parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# Of a safetensors file's header, and of an index: a name, a shape and a place for each tensor.
MAX_HEADER_BYTES = 16 << 20
# A mapped torch file is opened anew after this many bytes, which gives its pages back.
RELEASE_BYTES = 256 << 20
# Of a file that is read tensor by tensor, this much is asked for ahead.
READ_AHEAD = 64 << 20


class SafetensorsFile(TensorFile):
    """A .safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with open_file(path) as file:
                (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
                if length > MAX_HEADER_BYTES:
                    raise UserError(
                        f"{path} is not a whole safetensors file (its header has {length} bytes); "
                        "get it again"
                    )
                # The library checks the header against the file: sizes, overlaps, gaps. With
                # "pt" it would ask for memory to hold the whole file, see `map_file`.
                with safe_open(path, framework="np"):
                    pass
                header = parse_json(file.read(length), str(path))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}); get it again"
            ) from None
        header.pop("__metadata__", None)
        self.tensors, self._offsets = {}, {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(
                    f"{path}: {name} has the type {entry['dtype']}; QLLM reads {', '.join(DTYPES)}"
                )
            self.tensors[name] = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            self._offsets[name] = 8 + length + entry["data_offsets"][0]
        self._mapped: Tensor | None = None

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if tensor.numel():
            view = tensor.view(-1).view(torch.uint8).numpy().data
            with self.path.open("rb", buffering=0) as file:
                end = self._fill(file, view, self._offsets[name])
                if hasattr(os, "posix_fadvise"):  # what is read next comes while this is used
                    os.posix_fadvise(file.fileno(), end, READ_AHEAD, os.POSIX_FADV_WILLNEED)
        return tensor

    def _fill(self, file: io.FileIO, view: memoryview, offset: int) -> int:
        """Read a view's bytes from an offset; returns where they end."""
        file.seek(offset)
        done = 0
        while done < len(view) and (count := file.readinto(view[done:])):
            done += count
        if done < len(view):
            raise UserError(f"{self.path} became shorter while it was read; get it again")
        return offset + done

    def read_part(self, name: str, rows: range, columns: range | None) -> Tensor:
        info = self.tensors[name]
        width = torch.Size(info.shape[1:]).numel() * info.dtype.itemsize  # bytes of a row
        shape = (len(rows), *info.shape[1:])
        begin, size = rows.start * width, len(rows) * width
        if columns is not None:
            shape = (len(rows), len(columns))
            size = len(columns) * info.dtype.itemsize
        tensor = torch.empty(shape, dtype=info.dtype)
        if not tensor.numel():
            return tensor
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            if columns is None:
                self._fill(file, view, self._offsets[name] + begin)
                return tensor
            begin += self._offsets[name] + columns.start * info.dtype.itemsize
            if hasattr(os, "posix_fadvise"):  # pieces of rows: what lies between is not wanted
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for row in range(len(rows)):
                self._fill(file, view[row * size : (row + 1) * size], begin + row * width)
        return tensor

    def map(self, name: str) -> Tensor:
        info, offset = self.tensors[name], self._offsets[name]
        if offset % info.dtype.itemsize or 0 in info.shape:
            return self.read(name)
        if self._mapped is None:
            try:
                self._mapped = map_file(self.path)
            except OSError:  # where memory may not be promised twice; a copy does it there
                return self.read(name)
        size = info.dtype.itemsize * torch.Size(info.shape).numel()
        return self._mapped[offset : offset + size].view(info.dtype).view(info.shape)


def _is_plain_tensor(value: object) -> bool:
    """Whether it has its elements in memory: a pickle may hold sparse and meta tensors too."""
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    )


class TorchFile(TensorFile):
    """A pytorch_model.bin: a pickled dictionary of tensors, loaded with weights_only=True."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: dict[str, Tensor] | None = None
        self._bytes_read = 0
        self.tensors = {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._open().items()
        }
        self.release()

    def release(self) -> None:
        self._state, self._bytes_read = None, 0
        gc.collect()  # torch.load leaves cycles that hold on to the mapped file

    def _open(self) -> dict[str, Tensor]:
        if self._state is not None:
            return self._state
        try:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            self._mapped = check_torch_file(self.path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old formats; what does not load is an error
                state = torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=self._mapped
                )
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:  # a broken or hostile pickle makes the loader raise anything
            raise UserError(
                f"{self.path} is no whole torch checkpoint of tensors alone "
                f"({first_line(error)[:120]})"
            ) from None
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and _is_plain_tensor(value) for name, value in state.items()
        ):
            raise UserError(f"{self.path} holds something other than named tensors")
        odd = [name for name, tensor in state.items() if tensor.dtype not in DTYPES.values()]
        if odd:
            listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            found = str(state[odd[0]].dtype).removeprefix("torch.")
            raise UserError(f"{self.path}: {odd[0]} has the type {found}; QLLM reads {listed}")
        # A stride of 0 repeats an element without end; a tied head may share its elements.
        total, size = sum(tensor.nbytes for tensor in state.values()), self.path.stat().st_size
        if total > 2 * size:
            raise UserError(
                f"{self.path} has {size} bytes, and names tensors of {total}; get it again"
            )
        # Some were saved as parameters, which torch keeps from being written to.
        self._state = {name: tensor.detach() for name, tensor in state.items()}
        return self._state

    def read(self, name: str) -> Tensor:
        tensor = self._open()[name].clone(memory_format=torch.contiguous_format)
        self._bytes_read += tensor.nbytes
        if self._mapped and self._bytes_read > RELEASE_BYTES:
            self.release()
        return tensor

    def read_part(self, name: str, rows: range, columns: range | None) -> Tensor:
        tensor = self._open()[name][rows.start : rows.stop]
        if columns is not None:
            tensor = tensor[:, columns.start : columns.stop]
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        self._bytes_read += tensor.nbytes
        if self._mapped and self._bytes_read > RELEASE_BYTES:
            self.release()
        return tensor
