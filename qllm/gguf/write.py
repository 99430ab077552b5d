"""Write a GGUF file: a header of metadata and tensors, then the tensors' bytes, one by one."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qllm.gguf.file import ALIGNMENT, ARRAY, MAGIC, NUMBERS, STRING, VERSIONS, Value
from qllm.gguf.types import BlockType

# The types that numbers of Python are written as.
BOOLEAN, INTEGER, FLOAT = 7, 5, 6
UNSIGNED = 4  # what llama.cpp reads sizes and token ids as


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written.

    Attributes:
        shape: rows first.
    """

    shape: tuple[int, ...]
    type: BlockType

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return prod(self.shape) // self.type.values * self.type.nbytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    planned: Mapping[str, Planned],
    tensors: Iterable[Tensor],
) -> None:
    """Write a file.

    Args:
        tensors: uint8, the bytes of each of `planned`, in that order; one is in memory at a time.
    """
    header = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(planned), len(metadata))]
    for key, value in metadata.items():
        header += [_text(key), _value(value)]
    at = 0
    for name, tensor in planned.items():
        sizes = tensor.shape[::-1]
        header.append(_text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        header.append(struct.pack("<IQ", tensor.type.number, at))
        at += _aligned(tensor.nbytes)
    data = b"".join(header)
    with path.open("wb") as file:
        file.write(data.ljust(_aligned(len(data)), b"\0"))
        for data_of, plan in zip(tensors, planned.values(), strict=True):
            assert data_of.dtype == torch.uint8 and data_of.numel() == plan.nbytes
            file.write(data_of.contiguous().flatten().numpy().data)
            file.write(b"\0" * (_aligned(plan.nbytes) - plan.nbytes))
        file.flush()
        os.fsync(file.fileno())


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(value: Value) -> int:
    if isinstance(value, str):
        return STRING
    if isinstance(value, bool):
        return BOOLEAN
    if isinstance(value, int):
        return INTEGER if value < 0 else UNSIGNED
    return FLOAT


def _value(value: Value) -> bytes:
    """A value, and its type in front; lists are of texts, whole numbers (signed) or floats."""
    if not isinstance(value, list):
        kind = _kind(value)
        return struct.pack("<I", kind) + _bare(value, kind)
    kind = INTEGER if value and isinstance(value[0], int) else _kind(value[0] if value else "")
    parts = [_bare(each, kind) for each in value]
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(parts)


def _bare(value: Value, kind: int) -> bytes:
    return _text(str(value)) if kind == STRING else struct.pack(f"<{NUMBERS[kind]}", value)
