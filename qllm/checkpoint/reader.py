"""Tensors of a checkpoint folder, one at a time, and its config.json.

Files from outside are hostile: names in an index stay inside the folder.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qllm import files
from qllm.checkpoint.file_names import FileNames
from qllm.checkpoint.formats import QuantizationConfig, find_unscaled, parse
from qllm.checkpoint.gguf import GGUFFile, quantization_of
from qllm.checkpoint.small_floats import SmallFloats
from qllm.checkpoint.stacks import UnstackedFile
from qllm.checkpoint.tensor_files import MAX_HEADER_BYTES, SafetensorsFile, TorchFile
from qllm.checkpoint.tensors import TensorFile, is_finite
from qllm.config import EMBEDDING, LM_HEAD
from qllm.errors import UserError
from qllm.files import MAX_JSON_BYTES
from qllm.gguf import is_gguf
from qllm.gguf.config import read_config
from qllm.gguf.file import read_gguf
from qllm.models import FAMILIES
from qllm.models.family import RawConfig
from qllm.models.multimodal import text_of
from qllm.onnx_files import onnx_files

# QLLM's own layout of a checkpoint, in its config.json.
LAYOUT_KEY, LAYOUT = "qllm_layout", 1
# What config.json calls the way its weights are quantized; 16-bit ones have none.
QUANTIZATION_KEY = "quantization_config"
# What older compressed-tensors called it; files of the same content that others wrote
# beside config.json, and what their quant_method is where they do not say.
OLD_QUANTIZATION_KEY = "compression_config"
# What MLX calls it, beside which newer versions repeat it under the usual name.
MLX_QUANTIZATION_KEY = "quantization"
QUANTIZATION_FILES = {
    **{"quantize_config.json": "gptq", "quant_config.json": "awq"},
    "hf_quant_config.json": "modelopt",
}
# Weights have the first names in transformers; other tools have others.
STANDARD_NAMES = ("model.safetensors", "pytorch_model.bin")
OTHER_NAMES = (r"(?!adapter_).*\.safetensors", r"(?:pytorch|gptq)_model.*\.bin")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint.

    Raises:
        UserError: where there is none, or it has more than `max_bytes`.
    """
    try:
        return files.read_json(path, max_bytes)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no checkpoint: it has no {path.name}") from None


def read_raw_config(
    folder: Path, *, packed: bool = True, as_numbers: Collection[str] = ()
) -> RawConfig:
    """The folder's config.json; its QUANTIZATION_KEY is where older tools put it elsewhere, too.

    Of a multimodal model it is what its text model's would be.

    Args:
        folder: or a GGUF file, of whose metadata a config.json is made.
        packed: of a GGUF file, linears are as it has them; else they are its numbers.
        as_numbers: modules of one that are numbers all the same, see `GGUFFile`.
    """
    if is_gguf(folder):
        file = read_gguf(folder)
        values: dict[str, Any] = {**read_config(file), LAYOUT_KEY: LAYOUT}
        if packed:
            config = values[QUANTIZATION_KEY] = quantization_of(file, as_numbers)
            if LM_HEAD in as_numbers and EMBEDDING in config["modules"]:
                values["tie_word_embeddings"] = False  # for one is packed, and the other is not
        return RawConfig(values, str(folder))
    path = folder / "config.json"
    values = read_json(path)
    mlx = values.get(MLX_QUANTIZATION_KEY)
    if isinstance(mlx, dict) and values.get(QUANTIZATION_KEY) in (None, mlx):
        values[QUANTIZATION_KEY] = {"quant_method": "mlx", **mlx}
        del values[MLX_QUANTIZATION_KEY]  # else it would go along into what is made of this
    if values.get(QUANTIZATION_KEY) is None:
        values.pop(QUANTIZATION_KEY, None)
        found = values.pop(OLD_QUANTIZATION_KEY, None)
        for name, method in QUANTIZATION_FILES.items():
            if found is None and (folder / name).exists():
                found = read_json(folder / name)
                found["quant_method"] = found.get("quant_method") or method
        if found is not None:
            values[QUANTIZATION_KEY] = found
    return text_of(RawConfig(values, str(path)))


class Checkpoint:
    """The tensors of a checkpoint folder, by the names in its files.

    Attributes:
        folder: where it is.
        raw_config: its config.json.
        quantization: what that says of quantized modules; None where it says of none.
        tensors: name to shape and type; matrices of small floats as the numbers they are. Of a
            multimodal model those of its text model, by the names that this has alone.
        file_names: what the files call them.
        unpacked_types: what no layer holds as it is: of a GGUF file, types of blocks, of others
            kinds of small floats.
        floats: the matrices of small floats.
    """

    unpacked_types: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        *,
        packed: bool = True,
        dtype: torch.dtype = torch.float32,
        as_numbers: Collection[str] = (),
        packed_floats: Collection[int] = (),
    ) -> None:
        """
        Args:
            folder: or a GGUF file.
            packed, as_numbers: see `read_raw_config`.
            packed_floats: small floats of 4 bits are integers, as layers hold them, where so many
                share a scale; else all are numbers.
            dtype: in which the numbers of a GGUF file's blocks, and small floats, are read.

        Raises:
            UserError: where the folder holds no checkpoint, or a broken one.
        """
        self.folder = folder
        self.raw_config = read_raw_config(folder, packed=packed, as_numbers=as_numbers)
        self._files: dict[str, TensorFile] = {}
        self.file_names = FileNames(self.raw_config)
        elsewhere = self.raw_config.values.get("transformers_weights")
        if elsewhere is not None:
            raise self.raw_config.error("transformers_weights", elsewhere, "no entry of this name")
        # Before the tensors, whose types may be those of a format that is not read.
        settings = self.raw_config.values.get(QUANTIZATION_KEY)
        self.quantization: QuantizationConfig | None = None
        if settings is not None:
            self.quantization = parse(settings, self.raw_config.where)
            if self.raw_config.outer is not None:
                self.quantization = self.quantization.of_names(self.file_names.of_module)
        if is_gguf(folder):
            opened: Iterator[TensorFile] = iter(
                [GGUFFile(read_gguf(folder), packed, dtype, as_numbers)]
            )
            weight_map = None
        else:
            opened, weight_map = _open_weights(folder)
        last = self._take(opened, weight_map)
        named = self.file_names
        self.tensors = {name: file.tensors[named[name]] for name, file in self._files.items()}
        self._last, self._settings = last, self.quantization
        if isinstance(last, GGUFFile):
            self.floats = SmallFloats({}, dtype)
            self.unpacked_types = last.unpacked_types
        else:
            self.floats = self._find_floats(dtype, packed_floats)
            self._place_floats()

    def _take(
        self, opened: Iterable[TensorFile], weight_map: Mapping[str, str] | None
    ) -> TensorFile:
        """Take the tensors of files, of which the last is returned.

        Args:
            weight_map: an index's file of each tensor; None: there is no index.
        """
        stacked: dict[str, str] = {}
        for file in self._unstacked(opened):
            if isinstance(file, UnstackedFile):
                stacked |= file.modules
            path = file.path
            for name in file.tensors:
                stored = file.stored_name(name)
                if weight_map is not None and weight_map.get(stored) != path.name:
                    continue  # the index says that it is read from elsewhere, or not at all
                own = self.file_names.own(name, file.tensors[name])
                if own is None:
                    continue
                if own in self._files:
                    raise UserError(f"{path} holds {name}, as {self._files[own].path.name} does")
                self._files[own] = file
        if stacked and self.quantization is not None:
            self.quantization = self.quantization.of_names(
                lambda module: [module, stacked.get(module, module)]
            )
        return file

    def _unstacked(self, opened: Iterable[TensorFile]) -> Iterator[TensorFile]:
        """Files, of which what is of all experts of a layer is read expert by expert."""
        kind = self.raw_config.values.get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        for file in opened:
            if family is None or not family.stacks or is_gguf(self.folder):
                yield file
            else:
                yield UnstackedFile(file, family.stacks, self.raw_config.values.get("hidden_size"))

    def _find_floats(self, dtype: torch.dtype, packed: Collection[int]) -> SmallFloats:
        """The small floats, put in the place of what they are made of."""
        settings = self._settings
        find = find_unscaled if settings is None else settings.floats
        try:
            found = {} if find is None else find(self.tensors, self._read)
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None
        for matrix in found.values():
            for part in matrix.tensors:
                self.tensors.pop(part, None)
        return SmallFloats(found, dtype, packed)

    def _place_floats(self) -> None:
        self.unpacked_types = self.floats.kinds
        for name, (info, source) in self.floats.tensors().items():
            self.tensors[name] = info
            self._files.setdefault(name, self._files[source])
        self.quantization = self.floats.rules(self._settings)

    def read_as_numbers(self, modules: Collection[str]) -> None:
        """Have small floats as numbers where they were integers."""
        for name in self.floats.unpack(modules):
            del self.tensors[name]
        self._place_floats()

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
        if not tensor.dtype.is_floating_point or tensor.element_size() < 2:
            raise UserError(
                f"{file.path}: {name} holds {tensor.dtype}; weights are floating point here, of "
                "16 bits or more"
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
        if name in self.floats:
            return self.floats.read(name, self._read, rows, columns)
        return self._read(name, rows, columns, mapped=mapped)

    def _read(
        self,
        name: str,
        rows: range | None = None,
        columns: range | None = None,
        *,
        mapped: bool = False,
    ) -> Tensor:
        """A tensor of a file, or some rows and columns of it."""
        file, stored = self._files[name], self.file_names[name]
        if file is not self._last:  # one file of a sharded checkpoint is held open at a time
            self._last.release()
            self._last = file
        if columns is not None or (rows is not None and not mapped):
            rows = range(file.tensors[stored].shape[0]) if rows is None else rows
            return file.read_part(stored, rows, columns)
        tensor = file.map(stored) if mapped else file.read(stored)
        return tensor if rows is None else tensor[rows.start : rows.stop]

    def path(self, name: str) -> Path:
        """The file a tensor is in."""
        return self._files[name].path


def is_packed(raw_config: RawConfig) -> bool:
    """Whether a config.json says that modules are integers, which layers have as they are.

    Raises:
        UserError: for one that says of quantization what QLLM does not read.
    """
    settings = raw_config.values.get(QUANTIZATION_KEY)
    return settings is not None and parse(settings, raw_config.where).packs


def _open_weights(folder: Path) -> tuple[Iterator[TensorFile], Mapping[str, str] | None]:
    """The files of a folder, each opened as it is asked for, and an index's `weight_map`."""
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
    if onnx_files(folder):
        raise UserError(
            f"{folder} holds an ONNX model, and no checkpoint, which this takes; give the one that "
            "it was exported from"
        )
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
