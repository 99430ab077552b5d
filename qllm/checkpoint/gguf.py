"""A GGUF file's tensors under our names, each linear in one piece, its blocks as they are.

A file is a checkpoint in QLLM's layout (`weight_convert.py`), put together as it is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qllm.checkpoint.gguf_parts import Part, parts_of
from qllm.checkpoint.tensors import TensorFile, TensorInfo, map_file
from qllm.config import EMBEDDING, LM_HEAD
from qllm.errors import UserError
from qllm.gguf.file import GGUF
from qllm.gguf.types import BlockType, MixedType
from qllm.quant.packing import packed_size

# The tensor of a linear that is held as it is, and those of one whose parts have several types.
BLOCKS, MIXED = "blocks", ("qweight", "scales", "offsets")


def _is_linear(name: str) -> bool:
    """Whether one of our tensors is a linear's."""
    module = name.rpartition(".")[0]
    return module == "lm_head" or module.endswith((".qkv", ".out", ".up", ".down"))


def _is_held(name: str) -> bool:
    """Whether one of our tensors is a weight that is held as a file has it, where that can be."""
    module, _, kind = name.rpartition(".")
    return kind in ("weight", BLOCKS, *MIXED) and (module == "embed" or _is_linear(name))


def packed_types(
    parts: dict[str, list[Part]], as_numbers: Collection[str] = ()
) -> dict[str, BlockType | MixedType]:
    """Our name of each linear, and the embedding, whose numbers can be held as integers.

    Args:
        as_numbers: modules that are to be numbers.
    """
    found: dict[str, BlockType | MixedType] = {}
    for name, pieces in parts.items():
        types = tuple(dict.fromkeys(piece.tensor.type for piece in pieces))
        module = name.rpartition(".")[0]
        held = _is_held(name) and module not in as_numbers
        if held and all(kind.packs for kind in types):
            whole = len(types) == 1 and all(piece.chunks is None for piece in pieces)
            found[module] = types[0] if whole else MixedType(types)
    return found


def quantization_of(found: GGUF, as_numbers: Collection[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of a file: the type of each linear that is held as it is.

    Args:
        as_numbers: modules that are not.
    """
    types = packed_types(parts_of(found), as_numbers)
    return {
        "quant_method": "gguf",
        "modules": {n: kind.name for n, kind in types.items() if isinstance(kind, BlockType)},
        "mixed": {
            module: {"bits": kind.bits, "group": kind.group, "offset": kind.offset}
            for module, kind in types.items()
            if isinstance(kind, MixedType)
        },
    }


def _held_as(kind: BlockType | MixedType, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
    """The tensors of a linear (N, K) that is held as it is."""
    rows, columns = shape
    if isinstance(kind, BlockType):
        return {BLOCKS: TensorInfo((rows, kind.row_bytes(columns)), torch.uint8)}
    numbers = TensorInfo((rows, columns // kind.group), torch.float32)
    infos = (TensorInfo((rows, packed_size(columns, kind.bits)), torch.uint8), numbers, numbers)
    return dict(zip(MIXED[: 2 + kind.offset], infos, strict=False))


def _in_order(rows: Tensor, chunks: Tensor | None) -> Tensor:
    """Rows (N, …) whose runs of columns are put in order."""
    return rows if chunks is None else rows.view(len(rows), len(chunks), -1)[:, chunks].flatten(1)


class GGUFFile(TensorFile):
    """The tensors of a file, or of all that a model was split into.

    What is held as it is has "blocks", uint8 (N, bytes of a row), in place of a "weight"; where its
    parts have several types it has integers, scales and offsets.
    """

    def __init__(
        self,
        found: GGUF,
        packed: bool,
        dtype: torch.dtype = torch.float32,
        as_numbers: Collection[str] = (),
    ) -> None:
        """
        Args:
            packed: linears are held as they are where a layer can; else all are numbers.
            dtype: in which the numbers of blocks are read.
            as_numbers: modules that are numbers all the same. An LM head among them that the file
                has no tensor of is the embedding's numbers.
        """
        self._dtype = dtype
        self.path = found.path
        self._maps: dict[Path, Tensor] = {}
        self._parts = parts_of(found)
        self._types = types = packed_types(self._parts, as_numbers) if packed else {}
        if LM_HEAD in as_numbers and EMBEDDING in types:
            self._parts.setdefault(f"{LM_HEAD}.weight", self._parts[f"{EMBEDDING}.weight"])
        self.tensors: dict[str, TensorInfo] = {}
        for name in list(self._parts):
            module, pieces = name.rpartition(".")[0], self._parts[name]
            first = pieces[0].tensor
            shape = (sum(piece.rows for piece in pieces), *first.shape[1:])
            odd = [p.tensor.shape for p in pieces if p.tensor.shape[1:] != first.shape[1:]]
            if odd:
                raise UserError(f"{first.path}: {module} is of rows of {first.shape} and {odd[0]}")
            if module in types and name.endswith(".weight"):
                del self._parts[name]
                for key, info in _held_as(types[module], shape).items():
                    self._parts[f"{module}.{key}"] = pieces
                    self.tensors[f"{module}.{key}"] = info
                continue
            dtypes = {piece.tensor.type.dtype or dtype for piece in pieces}
            read_as = dtypes.pop() if len(dtypes) == 1 else torch.float32
            self.tensors[name] = TensorInfo(shape, read_as)

    @property
    def unpacked_types(self) -> tuple[str, ...]:
        """Of the matrices that are read as numbers since some of their parts are."""
        found = set()
        for name, pieces in self._parts.items():
            packed = {piece.tensor.type.name for piece in pieces if piece.tensor.type.packs}
            if _is_held(name) and not all(piece.tensor.type.packs for piece in pieces):
                found |= packed
        return tuple(sorted(found))

    def read(self, name: str) -> Tensor:
        return self.read_part(name, range(self.tensors[name].shape[0]), None)

    def map(self, name: str) -> Tensor:
        return self._rows(name, range(self.tensors[name].shape[0]))

    def read_part(self, name: str, rows: range, columns: range | None) -> Tensor:
        tensor = self._rows(name, rows)
        if columns is not None:
            return tensor[:, columns.start : columns.stop].clone()
        # Blocks are only read; what was made of some is in memory of its own.
        plain = all(part.tensor.type.dtype is not None for part in self._parts[name])
        return tensor.clone() if plain else tensor

    def _rows(self, name: str, rows: range) -> Tensor:
        """Some rows of a tensor, a view of the file where they lie there as they are."""
        info = self.tensors[name]
        pieces = [self._piece(part, run, name) for part, run in self._runs(name, rows)]
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat([piece.to(info.dtype) for piece in pieces])

    def _runs(self, name: str, rows: range) -> Iterator[tuple[Part, range]]:
        """The parts that some rows are in, and which of theirs."""
        begin = 0
        for part in self._parts[name]:
            run = range(max(rows.start - begin, 0), min(rows.stop - begin, part.rows))
            if run:
                yield part, run
            begin += part.rows

    def _piece(self, part: Part, run: range, name: str) -> Tensor:
        tensor = part.tensor
        module, _, key = name.rpartition(".")
        kind, perm = tensor.type, part.perm
        data = self._mapped(tensor.path)[tensor.offset : tensor.offset + tensor.nbytes]
        matrix = data.view(tensor.shape[0], -1)
        taken = matrix[run.start : run.stop] if perm is None else matrix[perm[run.start : run.stop]]
        mixed = self._types.get(module)
        if key == BLOCKS:
            return taken
        if key in MIXED and isinstance(mixed, MixedType):
            of_part = dict(zip(MIXED, (mixed.qweight, mixed.scales, mixed.offsets), strict=True))
            return _in_order(of_part[key](kind, taken), part.chunks)
        numbers = _in_order(kind.dequantize(taken, self._dtype), part.chunks)
        if part.offset:
            numbers = numbers - part.offset
        if part.decays:
            numbers = (-numbers).log()
        return numbers.view(len(run), *tensor.shape[1:])

    def _mapped(self, path: Path) -> Tensor:
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]
