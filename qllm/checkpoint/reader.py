"""Tensors of a checkpoint folder, one at a time, from safetensors or torch files.

Files from outside are hostile: headers are checked by the safetensors library before they are
used, pickles are loaded with `weights_only=True`, names in an index stay inside the folder.
"""

from __future__ import annotations

import gc
import io
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qllm import files
from qllm.checkpoint.gguf import GGUFFile, quantization_of
from qllm.checkpoint.pickles import check_torch_file
from qllm.checkpoint.tensors import TensorFile, TensorInfo, is_finite, map_file
from qllm.errors import UserError, first_line
from qllm.files import MAX_JSON_BYTES, open_file, parse_json
from qllm.gguf import is_gguf
from qllm.gguf.config import read_config
from qllm.gguf.file import read_gguf
from qllm.models.family import RawConfig

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Of a safetensors file's header, and of an index: a name, a shape and a place for each tensor.
MAX_HEADER_BYTES = 16 << 20
# QLLM's own layout of a checkpoint, in its config.json.
LAYOUT_KEY, LAYOUT = "qllm_layout", 1
# What config.json calls the way its weights are quantized; 16-bit ones have none.
QUANTIZATION_KEY = "quantization_config"
# What older compressed-tensors called it; files of the same content that AutoGPTQ and AutoAWQ wrote
# beside config.json, and what their quant_method is where they do not say.
OLD_QUANTIZATION_KEY = "compression_config"
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Weights have the first names in transformers; other tools have others.
STANDARD_NAMES = ("model.safetensors", "pytorch_model.bin")
OTHER_NAMES = (r"(?!adapter_).*\.safetensors", r"(?:pytorch|gptq)_model.*\.bin")
# A mapped torch file is opened anew after this many bytes, which gives its pages back.
RELEASE_BYTES = 256 << 20
# Of a file that is read tensor by tensor, this much is asked for ahead.
READ_AHEAD = 64 << 20


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        UserError: where there is none, or it has more than `most` bytes.
    """
    try:
        return files.read_json(path, max_bytes)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no checkpoint: it has no {path.name}") from None


def read_raw_config(folder: Path, *, packed: bool = True) -> RawConfig:
    """The folder's config.json; its QUANTIZATION_KEY is where older tools put it elsewhere, too.

    Args:
        folder: or a GGUF file, of whose metadata a config.json is made.
        packed: of a GGUF file, linears are as it has them; else they are its numbers.
    """
    if is_gguf(folder):
        file = read_gguf(folder)
        values: dict[str, Any] = read_config(file) | {LAYOUT_KEY: LAYOUT}
        if packed:
            values[QUANTIZATION_KEY] = quantization_of(file)
            # A head that is the embedding, in blocks, is a linear of its own.
            if "lm_head" in values[QUANTIZATION_KEY]["modules"]:
                values["tie_word_embeddings"] = False
        return RawConfig(values, str(folder))
    path = folder / "config.json"
    values = read_json(path)
    if values.get(QUANTIZATION_KEY) is None:
        values.pop(QUANTIZATION_KEY, None)
        found = values.get(OLD_QUANTIZATION_KEY)
        for name, method in QUANTIZATION_FILES.items():
            if found is None and (folder / name).exists():
                found = read_json(folder / name)
                found["quant_method"] = found.get("quant_method") or method
        if found is not None:
            values[QUANTIZATION_KEY] = found
    return RawConfig(values, str(path))


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
                raise UserError(f"{path}: {name} has the type {entry['dtype']}, which QLLM lacks")
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
            raise UserError(
                f"{self.path}: {odd[0]} has the type {state[odd[0]].dtype}, which QLLM lacks"
            )
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


class Checkpoint:
    """The tensors of a checkpoint folder, by the names in its files.

    Attributes:
        folder: where it is.
        raw_config: its config.json.
        tensors: name to shape and type.
        unpacked_types: of a GGUF file, the types of blocks that no layer holds as they are.
    """

    unpacked_types: tuple[str, ...] = ()

    def __init__(
        self, folder: Path, *, packed: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        """
        Args:
            folder: or a GGUF file.
            packed: see `read_raw_config`.
            dtype: of a GGUF file, in which the numbers of blocks are read.

        Raises:
            UserError: where the folder holds no checkpoint, or a broken one.
        """
        self.folder = folder
        self.raw_config = read_raw_config(folder, packed=packed)
        self._files: dict[str, TensorFile] = {}
        elsewhere = self.raw_config.values.get("transformers_weights")
        if elsewhere is not None:
            raise self.raw_config.error("transformers_weights", elsewhere, "no entry of this name")
        opened, weight_map = _open_weights(folder, packed, dtype)
        for file in opened:
            path = file.path
            for name in file.tensors:
                if weight_map is not None and weight_map.get(name) != path.name:
                    continue  # the index says that it is read from elsewhere, or not at all
                if name in self._files:
                    raise UserError(f"{path} holds {name}, as {self._files[name].path.name} does")
                self._files[name] = file
        self.tensors = {name: file.tensors[name] for name, file in self._files.items()}
        if isinstance(file, GGUFFile):
            self.unpacked_types = file.unpacked_types
        self._last = file

    def read(
        self,
        name: str,
        *,
        mapped: bool = False,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """A tensor of weights, in memory of its own, or with `mapped` as a view of its file.

        Args:
            rows, columns: the part of it that is read; None is all.

        Raises:
            UserError: for a tensor that is not floating point, or not finite.
        """
        tensor = self.read_any(name, mapped=mapped, rows=rows, columns=columns)
        file = self._files[name]
        if not tensor.dtype.is_floating_point:
            raise UserError(
                f"{file.path}: {name} holds {tensor.dtype}; weights are floating point here"
            )
        if not is_finite(tensor):
            raise UserError(f"{file.path}: {name} holds NaN or infinite values; get it again")
        # No kernel knows float64.
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def read_any(
        self,
        name: str,
        *,
        mapped: bool = False,
        rows: range | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """A tensor as it is, or some rows and columns of it."""
        file = self._files[name]
        if file is not self._last:  # one file of a sharded checkpoint is held open at a time
            self._last.release()
            self._last = file
        if columns is not None or (rows is not None and not mapped):
            rows = range(self.tensors[name].shape[0]) if rows is None else rows
            return file.read_part(name, rows, columns)
        tensor = file.map(name) if mapped else file.read(name)
        return tensor if rows is None else tensor[rows.start : rows.stop]

    def path(self, name: str) -> Path:
        """The file a tensor is in."""
        return self._files[name].path


def _open_weights(
    folder: Path, packed: bool, dtype: torch.dtype
) -> tuple[Iterator[TensorFile], Mapping[str, str] | None]:
    """The files of a checkpoint, each opened as it is asked for, and an index's `weight_map`."""
    if is_gguf(folder):
        return iter([GGUFFile(read_gguf(folder), packed, dtype)]), None
    paths, weight_map = _find_weights(folder)
    kinds = {True: SafetensorsFile, False: TorchFile}
    return (kinds[path.suffix == ".safetensors"](path) for path in paths), weight_map


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors before torch, whole before sharded.

    Of a GGUF file, it and what else its model was split into.

    Raises:
        UserError: where there are none, an index names one that is missing or elsewhere, or several
            have names from which it cannot be told which to read.
    """
    return read_gguf(folder).paths if is_gguf(folder) else _find_weights(folder)[0]


def _find_weights(folder: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files of `weight_files`, and an index's name of the file that each tensor is in."""
    for stem in STANDARD_NAMES:
        if (folder / stem).exists():
            return [folder / stem], None
        index = folder / f"{stem}.index.json"
        if index.exists():
            return _read_index(index)
    names = sorted(path.name for path in folder.iterdir() if path.exists())
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(indices) == 1:
        return _read_index(folder / indices[0])
    for pattern in OTHER_NAMES:
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found and not _are_whole(found):
            listed = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
            raise UserError(
                f"{folder} holds {listed}: neither one file, nor all of a numbered set, and there "
                "is no index that says which tensor is read from which"
            )
        if found:
            return [folder / name for name in found], None
    raise UserError(
        f"{folder} is no checkpoint: it has neither {' nor '.join(STANDARD_NAMES)}, whole or with "
        "an index"
    )


def _are_whole(names: Sequence[str]) -> bool:
    """Whether file names are a single one, or 00001-of-N to N-of-N of one set."""
    matches = (re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(\..*)", name) for name in names)
    found = [match for match in matches if match is not None]
    if len(found) < len(names):
        return len(names) == 1
    sets = {match.group(1, 3, 4) for match in found}
    return len(sets) == 1 and len(names) == int(found[0][3])


def _read_index(index: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The files that an index names, and its file of each tensor."""
    weight_map = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map from tensor names to files")
    for name in weight_map.values():
        # A name is compared with those of the folder; it never becomes a path of its own.
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".."):
            raise UserError(f"{index} names {name!r}, which is not a file of its own folder")
    names = list(dict.fromkeys(weight_map.values()))
    present = {path.name for path in index.parent.iterdir() if path.exists()}
    for name in names:
        if name not in present:
            raise UserError(
                f"{index.parent} lacks {name}, one of {len(names)} that its index names"
            )
    return [index.parent / name for name in names], weight_map
