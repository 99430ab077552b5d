"""bitsandbytes' checkpoints, of 4 bits (QLoRA's NF4, and FP4) and of 8 (LLM.int8()); only read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import FloatMatrix, Infos, Quantized, ReadRows
from qllm.checkpoint.formats.floats import check_type, is_size, look_up
from qllm.checkpoint.formats.int_quantized import IntQuantized
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, short
from qllm.checkpoint.formats.tensors import TensorReader
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.files import parse_json

# Behind a weight's name, and in front of the kind of its numbers: settings in JSON, as bytes.
STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
MAX_STATE_BYTES = 4096
CODES, NESTED_CODES = 16, 256
# LLM.int8() scales by the largest of a row, which is 127.
LARGEST = 127


@dataclass(frozen=True)
class FourBits(FloatMatrix):
    """A matrix whose rows lie end to end, in blocks: each weight is a code's number, times the
    largest of its block.

    weight            (N K / 2, 1) bytes, the first code in the upper half; some have them as the
                      bytes of a wider type
    weight.quant_map  float32 (16,): the number of each code
    weight.absmax     float32, one per block; or uint8, codes as well
    weight.quant_state.bitsandbytes__nf4
                      the bytes of JSON: `blocksize`, `shape`, and, where absmax is codes,
                      `nested_blocksize` and `nested_offset`
    weight.nested_quant_map, weight.nested_absmax
                      float32 (256,), and one per block of absmax

    Attributes:
        blocksize: weights in a block.
        nested_blocksize: blocks that share a scale of their absmax; 0 where that is float32.
        nested_offset: what is added to such.
    """

    kind = "4 bits of bitsandbytes"

    blocksize: int
    nested_blocksize: int
    nested_offset: float

    def read(self, read: ReadRows, rows: range) -> Tensor:
        columns, size = self.shape[1], self.blocksize
        # From the block in which they begin to the one in which they end.
        blocks = range(rows.start * columns // size, -(-rows.stop * columns // size))
        first = blocks.start * size
        count = min(blocks.stop * size, self.shape[0] * columns) - first
        values, codes = read(f"{self.tensors[0]}.quant_map", None), torch.arange(256)
        pairs = torch.stack([values[codes >> 4], values[codes & 15]], dim=1)
        numbers = look_up(self._packed(read, first, count)[None], pairs)[0]
        numbers = numbers[:count].mul_(self._largest(read, blocks).repeat_interleave(size)[:count])
        begin = rows.start * columns - first
        return numbers[begin : begin + len(rows) * columns].view(len(rows), columns)

    def _packed(self, read: ReadRows, first: int, count: int) -> Tensor:
        """The bytes of some codes, from one that begins a block on."""
        name = self.tensors[0]
        item = read(name, range(1)).element_size()
        begin, end = first // 2, (first + count + 1) // 2
        words = read(name, range(begin // item, -(-end // item)))
        skip = begin % item
        return words.reshape(-1).view(torch.uint8)[skip : skip + end - begin]

    def _largest(self, read: ReadRows, blocks: range) -> Tensor:
        """The largest number of each of some blocks."""
        name = self.tensors[0]
        found, size = read(f"{name}.absmax", blocks), self.nested_blocksize
        if not size:
            return found
        outer = range(blocks.start // size, -(-blocks.stop // size))
        scales = read(f"{name}.nested_absmax", outer)
        which = torch.arange(blocks.start, blocks.stop) // size - outer.start
        codes = read(f"{name}.nested_quant_map", None)[found.int()]
        return codes * scales[which] + self.nested_offset


@dataclass(frozen=True)
class Int8(IntQuantized):
    """A linear of LLM.int8(), whose activations stay at 16 bits here.

    weight         int8 (N, K)
    SCB            float32 (N,): the largest weight of each row, which its integers have as 127
    weight_format  0: rows lie one behind the other
    """

    name = "bitsandbytes"
    tensors = ("weight", "SCB")
    optional = ("weight_format",)
    channels = dict.fromkeys(tensors, (0, False))

    @staticmethod
    def holds(spec: QuantSpec) -> bool:
        return False

    def read(self, tensors: Mapping[str, Tensor], in_features: int, out_features: int) -> Quantized:
        found = dict(tensors)
        layout = found.pop("weight_format", None)
        if layout is not None and layout.count_nonzero():
            raise UserError("weight_format is not 0, rows one behind the other, which QLLM reads")
        read = TensorReader(tensors, self.spec, in_features, out_features)
        found["SCB"] = read.scales("SCB", (out_features,)).float()[:, None] / LARGEST
        return super().read(found, in_features, out_features)


def parse(fields: Fields) -> QuantizationConfig:
    """https://huggingface.co/docs/transformers/quantization/bitsandbytes"""
    bits = {key: fields.flag(f"load_in_{key}", False) for key in ("4bit", "8bit")}
    if bits["4bit"] == bits["8bit"]:
        said = f"load_in_4bit and load_in_8bit both {short(bits['4bit'])}"
        raise fields.error(said, "one of them is true")
    if bits["8bit"]:
        return QuantizationConfig((), Int8(QuantSpec(8, -1, "sym", "weight_only")))
    return QuantizationConfig((), None, find_four_bits)


def find_four_bits(infos: Infos, read: ReadRows) -> dict[str, FloatMatrix]:
    """The matrices of 4 bits, whose shapes are in a tensor of each."""
    found: dict[str, FloatMatrix] = {}
    for name in infos:
        weight, _, kind = name.partition(STATE)
        if kind in KINDS and weight in infos:
            found[weight] = _matrix(infos, read, weight, name)
    return found


def _matrix(infos: Infos, read: ReadRows, weight: str, state: str) -> FourBits:
    check_type(infos, state, (torch.uint8,))
    size = torch.Size(infos[state].shape).numel()
    if size > MAX_STATE_BYTES:
        raise UserError(f"{state} has {size} bytes, expected a few hundred")
    fields = Fields(parse_json(bytes(read(state, None).flatten().tolist()), state), state)
    shape = fields.value.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_size, shape)):
        raise UserError(f"{state} has shape {short(shape)}, expected two whole numbers above 0")
    blocksize = fields.number("blocksize")
    nested = f"{weight}.nested_absmax" in infos
    nested_blocksize = fields.number("nested_blocksize") if nested else 0
    offset = fields.value.get("nested_offset") if nested else 0.0
    if blocksize < 2 or blocksize % 2 or (nested and nested_blocksize < 1):
        raise UserError(f"{state} has a blocksize of {blocksize} and {nested_blocksize}")
    if isinstance(offset, bool) or not isinstance(offset, int | float):
        raise UserError(f"{state} has nested_offset {short(offset)}, expected a number")
    count = shape[0] * shape[1]
    blocks = -(-count // blocksize)
    sizes: dict[str, tuple[int, tuple[torch.dtype, ...]]] = {
        "absmax": (blocks, (torch.uint8,) if nested else (torch.float32,)),
        "quant_map": (CODES, (torch.float32,)),
    }
    if nested:
        sizes["nested_absmax"] = (-(-blocks // nested_blocksize), (torch.float32,))
        sizes["nested_quant_map"] = (NESTED_CODES, (torch.float32,))
    for key, (length, dtypes) in sizes.items():
        _check(infos, f"{weight}.{key}", (length,), dtypes)
    dtype = infos[weight].dtype
    _check(infos, weight, (-(-count // 2 // dtype.itemsize), 1), (dtype,))
    tensors = (weight, state, *(f"{weight}.{key}" for key in sizes))
    return FourBits((shape[0], shape[1]), tensors, blocksize, nested_blocksize, float(offset))


def _check(
    infos: Infos, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if name not in infos:
        raise UserError(f"{name} is missing")
    check_type(infos, name, dtypes)
    if infos[name].shape != shape:
        raise UserError(f"{name} has the shape {list(infos[name].shape)}, expected {list(shape)}")
