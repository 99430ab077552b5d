"""What a file of a checkpoint is to its reader, whatever its format."""

from __future__ import annotations

import mmap
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFile(ABC):
    """The tensors of one file.

    Attributes:
        tensors: name to shape and type.
    """

    path: Path
    tensors: dict[str, TensorInfo]

    def stored_name(self, name: str) -> str:
        """What the file itself calls the tensor, or that which it is a part of."""
        return name

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""

    def map(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file where the file allows it, else a copy."""
        return self.read(name)

    @abstractmethod
    def read_part(self, name: str, rows: range, columns: range | None) -> Tensor:
        """Some rows of a tensor, and of those some columns where they are given."""

    def release(self) -> None:  # noqa: B027 - most files keep nothing open
        """Give back what was kept open to read from; a later read opens it again."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: where one is, the extremes are, found faster."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def map_file(path: Path) -> Tensor:
    """A file's bytes as a tensor, paged in as they are used; writing to it changes no file.

    torch.from_file asks for memory to hold all of it, which a file larger than memory does not get.
    """
    no_reserve = 0x4000 if sys.platform == "linux" else 0
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", no_reserve)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.frombuffer(mapped, dtype=torch.uint8)
