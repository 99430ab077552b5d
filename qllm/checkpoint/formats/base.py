"""What every checkpoint format is: the tensors of a quantized module, read and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from qllm.checkpoint.formats.tensors import WORD
from qllm.checkpoint.tensors import TensorInfo
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight


class Int8Weight(NamedTuple):
    """A matrix (N, K) as int8 with one scale per output channel, for int8 activations.

    Attributes:
        qweight: int8 (N, K).
        scales: float16 or float32 (N,).
        input_scale: float32 (), the activations' scale; None where they get one per token.
    """

    qweight: Tensor
    scales: Tensor
    input_scale: Tensor | None = None


Quantized = PackedWeight | Int8Weight


@dataclass(frozen=True)
class Format(ABC):
    """How a quantized module is stored: the format is the class, its settings are the fields.

    Attributes:
        name: of the format.
        tensors, optional: that a module has, and may have, by their names less the module's.
        channels: the tensors in which output channels lie side by side, to the dimension along
            which they do, and whether several of them share a word there.
        spec: as the config has it. GPTQ's `sym` binds nobody: whether a grid is symmetric is seen
            in its zero points.
    """

    name: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]] = ()
    channels: ClassVar[Mapping[str, tuple[int, bool]]]

    spec: QuantSpec

    @staticmethod
    def holds(spec: QuantSpec) -> bool:
        """Whether QLLM writes modules of this spec in this format; most are only read."""
        return False

    @property
    def held_bits(self) -> int:
        """Bits of an integer, as CPU kernels hold it."""
        return self.spec.bits

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Quantized:
        """One module's tensors as a matrix.

        Raises:
            UserError: for tensors that are not what the settings say; it begins with a tensor's
                name.
        """

    def write(self, weight: Quantized, in_features: int) -> dict[str, Tensor]:
        """The inverse of `read`, for modules that the format `holds`."""
        raise NotImplementedError

    def slices(
        self, shapes: Mapping[str, Sequence[int]], out_features: int, run: range
    ) -> dict[str, tuple[int, range]] | None:
        """What to read of a module's tensors for some of its output channels.

        Args:
            shapes: of the tensors that are there.
            run: ends of it lie between words, at a multiple of WORD or behind the last channel.

        Returns:
            dimension and run of each tensor that has channels; None where one is not as long as
            the channels are many, so that none can be cut.
        """
        found = {}
        for key, (dim, packed) in self.channels.items():
            if key not in shapes:
                continue
            bits = self.spec.bits if packed else WORD
            if len(shapes[key]) != 2 or shapes[key][dim] != -(-out_features * bits // WORD):
                return None
            found[key] = dim, range(run.start * bits // WORD, -(-run.stop * bits // WORD))
        return found


# Reads a tensor of the file by its name: some rows, or all where they are None.
ReadRows = Callable[[str, range | None], Tensor]
Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class FloatMatrix(ABC):
    """A matrix (N, K) of small floats, which no layer holds: it is read as numbers (`floats`).

    Attributes:
        kind: what its numbers are called.
        shape: N and K.
        tensors: of the file, by their names, that it is made of.
    """

    kind: ClassVar[str]

    shape: tuple[int, int]
    tensors: tuple[str, ...]

    @abstractmethod
    def read(self, read: ReadRows, rows: range) -> Tensor:
        """Some rows, float32 (R, K).

        Raises:
            UserError: for tensors whose values cannot be; it begins with a tensor's name.
        """


# Finds the matrices of a file, by the name that each would have at 16 bits. It raises a UserError,
# which begins with a tensor's name, for one that lacks a scale, or whose shapes do not fit.
Finder = Callable[[Infos, ReadRows], dict[str, FloatMatrix]]


def join_rows(parts: Sequence[Quantized], bits: int) -> Quantized:
    """The matrix whose rows are those of `parts`, one after the other; its scales are computable.

    Static activation scales of the parts may differ: the largest holds all of them, as in vLLM.

    Raises:
        UserError: for parts whose input channels lie in different orders.
    """
    scales = torch.cat([part.scales for part in parts])
    if scales.dtype == torch.bfloat16:
        scales = scales.float()
    qweight = torch.cat([part.qweight for part in parts])
    first = parts[0]
    if isinstance(first, Int8Weight):
        found = [part.input_scale for part in parts if isinstance(part, Int8Weight)]
        inputs = [scale for scale in found if scale is not None]
        return Int8Weight(qweight, scales, torch.stack(inputs).amax() if inputs else None)
    packed = [part for part in parts if isinstance(part, PackedWeight)]
    for part in packed[1:]:
        orders = [p.perm for p in (first, part) if p.perm is not None]
        if len(orders) == 1 or (orders and not torch.equal(*orders)):
            raise UserError("their g_idx differ, and they are one matrix here")
    zeros = [part.qzeros for part in packed]
    if any(zero.numel() for zero in zeros):  # a symmetric part among others has its zeros, too
        middle = 2 ** (bits - 1)
        zeros = [
            zero if zero.numel() else torch.full_like(part.scales, middle, dtype=torch.uint8)
            for zero, part in zip(zeros, packed, strict=True)
        ]
    return PackedWeight(qweight, scales, torch.cat(zeros), first.perm)


def take_rows(weight: Quantized, rows: Tensor | slice) -> Quantized:
    """Some rows of a matrix, in a new order."""
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.qweight[rows], weight.scales[rows], weight.input_scale)
    zeros = weight.qzeros[rows] if weight.qzeros.numel() else weight.qzeros
    return PackedWeight(weight.qweight[rows], weight.scales[rows], zeros, weight.perm)
