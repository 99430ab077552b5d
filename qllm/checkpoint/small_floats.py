"""A checkpoint's matrices of small floats, read as numbers, or, those of 4 bits, as integers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qllm.checkpoint.formats import FP4, FloatMatrix, QuantizationConfig
from qllm.checkpoint.formats.base import ReadRows
from qllm.checkpoint.formats.floats import Float4
from qllm.checkpoint.formats.fp4 import BITS
from qllm.checkpoint.formats.tensors import chunks
from qllm.checkpoint.tensors import TensorInfo
from qllm.config import QuantSpec

CODES, _ = FP4.tensors


class _Half(NamedTuple):
    """A tensor of a matrix of 4 bits that is held as it is."""

    matrix: Float4
    key: str


class SmallFloats:
    """Matrices of small floats, and what a checkpoint has of them.

    Attributes:
        numbers: those that are read as numbers, by the names that these have; (N, K), whatever the
            family has.
        modules: how the others are stored, by the names of their modules.
    """

    def __init__(
        self,
        found: Mapping[str, FloatMatrix],
        dtype: torch.dtype,
        packed: Collection[int] = (),
    ) -> None:
        """
        Args:
            dtype: of the numbers.
            packed: those of 4 bits are integers, where groups of so many inputs share a scale.
        """
        self.found, self.dtype = found, dtype
        self.modules: dict[str, FP4] = {}
        self._halves: dict[str, _Half] = {}
        for name, matrix in found.items():
            if isinstance(matrix, Float4) and matrix.group in packed:
                module = name.rpartition(".")[0]
                self.modules[module] = FP4(QuantSpec(BITS, matrix.group, "sym", "weight_only"))
                self._halves |= {f"{module}.{key}": _Half(matrix, key) for key in FP4.tensors}

    @property
    def numbers(self) -> dict[str, FloatMatrix]:
        return {n: m for n, m in self.found.items() if n.rpartition(".")[0] not in self.modules}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the numbers of those that are read as such are called in their file."""
        return tuple(sorted({matrix.kind for matrix in self.numbers.values()}))

    def tensors(self) -> dict[str, tuple[TensorInfo, str]]:
        """What a checkpoint has in the place of what matrices are made of, and their first part."""
        found = {
            name: (TensorInfo(matrix.shape, self.dtype), matrix.tensors[0])
            for name, matrix in self.numbers.items()
        }
        for name, (matrix, key) in self._halves.items():
            rows, columns = matrix.shape
            shape = (rows, columns // 2 if key == CODES else columns // matrix.group)
            info = TensorInfo(shape, torch.uint8 if key == CODES else torch.float32)
            found[name] = info, matrix.tensors[0]
        return found

    def unpack(self, modules: Collection[str]) -> list[str]:
        """Read some modules as numbers after all; the names of what they had."""
        gone = [f"{m}.{key}" for m in modules if m in self.modules for key in FP4.tensors]
        for name in gone:
            del self._halves[name]
        self.modules = {n: kind for n, kind in self.modules.items() if n not in modules}
        return gone

    def rules(self, settings: QuantizationConfig | None) -> QuantizationConfig | None:
        """A `quantization_config` that knows of those that are integers."""
        if settings is None or not self.modules:
            return settings
        names: dict[FP4, set[str]] = {}
        for module, storage in self.modules.items():
            names.setdefault(storage, set()).add(module)
        own = [(same.__contains__, storage) for storage, same in names.items()]
        return replace(settings, rules=(*own, *settings.rules))

    def __contains__(self, name: str) -> bool:
        return name in self._halves or name in self.found

    def read(self, name: str, read: ReadRows, rows: range | None, columns: range | None) -> Tensor:
        """Some of a tensor of `tensors`."""
        half = self._halves.get(name)
        matrix = self.found[name] if half is None else half.matrix
        rows = range(matrix.shape[0]) if rows is None else rows
        cut = slice(None) if columns is None else slice(columns.start, columns.stop)
        if half is not None:
            found = half.matrix.codes if half.key == CODES else half.matrix.scales
            return found(read, rows)[:, cut]
        # A few rows at a time, which are wider in between.
        width = matrix.shape[1] if columns is None else len(columns)
        numbers = torch.empty(len(rows), width, dtype=self.dtype)
        for part in chunks(len(rows), matrix.shape[1]):
            run = range(rows.start + part.start, rows.start + part.stop)
            numbers[part] = matrix.read(read, run)[:, cut].to(self.dtype)
        return numbers
