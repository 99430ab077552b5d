"""A file whose layers have a tensor of all experts, read as if each had tensors of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import Tensor

from qllm.checkpoint.tensors import TensorFile, TensorInfo
from qllm.errors import UserError
from qllm.models.family import MAX_EXPERTS
from qllm.models.stacks import Stack, Stacks

LAYER = re.compile(r"(?:.*\.)?(?:layers|h)\.\d+\.")
# Names that a file's stacks come to; the largest models have some hundred thousand.
MAX_NAMES = 1 << 20


class _Part(NamedTuple):
    """The tensor of an expert: of which stack, of which expert, and which rows of it."""

    stack: str
    expert: int
    rows: slice
    turned: bool


class UnstackedFile(TensorFile):
    """The tensors of another file, those of all experts one by one.

    A tensor of an expert is a matrix (N, K), whichever way the stack has it, or a vector (N,); what
    lies behind its rows comes in one piece.

    Attributes:
        modules: each linear of an expert, to what the file calls that of all.
    """

    def __init__(self, file: TensorFile, stacks: Stacks, hidden_size: object) -> None:
        """
        Args:
            stacks: what tensors hold, by their names behind the layer's.
            hidden_size: what the config.json says.

        Raises:
            UserError: for a stack of no such shape.
        """
        self.file, self.path, self._hidden = file, file.path, hidden_size
        self.tensors: dict[str, TensorInfo] = {}
        self.modules: dict[str, str] = {}
        self._parts: dict[str, _Part] = {}
        for name, info in file.tensors.items():
            layer = LAYER.match(name)
            stack = stacks.get(name[layer.end() :]) if layer else None
            if layer is None or stack is None:
                self.tensors[name] = info
                continue
            for inner, part, shape in self._parts_of(name, info, stack):
                own = layer[0] + inner
                self._parts[own] = part
                self.tensors[own] = TensorInfo(shape, info.dtype)
                self.modules[own.rpartition(".")[0]] = name.removesuffix(f".{stack.kind}")
            if len(self._parts) > MAX_NAMES:
                raise UserError(f"{self.path} has more than {MAX_NAMES} tensors of experts")

    def _parts_of(
        self, name: str, info: TensorInfo, stack: Stack
    ) -> Iterator[tuple[str, _Part, tuple[int, ...]]]:
        """The name of each expert's tensors, where they are, and their shapes."""
        count, *shape = info.shape or (0,)
        turned = stack.turned
        if turned is None and len(shape) == 2:
            turned = shape[stack.outer] != self._hidden == shape[1 - stack.outer]
        if turned:
            shape = shape[::-1]
        parts = len(stack.parts)
        wanted = 2 if turned or stack.kind == "weight" else 1
        if len(shape) < wanted or shape[0] % parts or 0 in shape or not 0 < count <= MAX_EXPERTS:
            each = f" of {parts} linears" if parts > 1 else ""
            raise UserError(
                f"{self.path}: {name} has the shape {list(info.shape)}; it is to have a tensor"
                f"{each} for each of up to {MAX_EXPERTS} experts"
            )
        rows, *behind = shape
        found = (rows // parts, prod(behind)) if behind else (rows // parts,)
        for expert in range(count):
            for i, part in enumerate(stack.parts):
                run = slice(i * rows // parts, (i + 1) * rows // parts)
                chosen = slice(i, None, parts) if stack.interleaved else run
                inner = f"{part.format(expert)}.{stack.kind}"
                yield inner, _Part(name, expert, chosen, bool(turned)), found

    def stored_name(self, name: str) -> str:
        return self._parts[name].stack if name in self._parts else name

    def release(self) -> None:
        self.file.release()

    def map(self, name: str) -> Tensor:
        return self.read(name) if name in self._parts else self.file.map(name)

    def read(self, name: str) -> Tensor:
        if name not in self._parts:
            return self.file.read(name)
        return self._view(name).contiguous()

    def read_part(self, name: str, rows: range, columns: range | None) -> Tensor:
        if name not in self._parts:
            return self.file.read_part(name, rows, columns)
        found = self._view(name)[rows.start : rows.stop]
        if columns is not None:
            found = found[:, columns.start : columns.stop]
        return found.contiguous()

    def _view(self, name: str) -> Tensor:
        """A tensor of an expert, in memory of its own with what else there is of that expert."""
        part = self._parts[name]
        one = self.file.read_part(part.stack, range(part.expert, part.expert + 1), None)[0]
        one = (one.mT if part.turned else one)[part.rows]
        return one.flatten(1) if one.ndim > 1 else one
