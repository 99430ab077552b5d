"""Matrices of small floats, which no layer computes with: a checkpoint reads them as numbers.

Which of its matrices they are, a file says itself, by the types and the names of its tensors, and
not by the lists of modules in settings, which every tool keeps in its own way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qllm.checkpoint.formats.base import FloatMatrix, Infos, ReadRows
from qllm.checkpoint.formats.settings import Fields, QuantizationConfig, short
from qllm.checkpoint.tensors import TensorInfo
from qllm.errors import UserError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Powers of two, by their exponents plus 127 (E8M0), as a type of their own or as bytes.
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What both halves of a byte are in E2M1, the lower one first.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Of values of FP4 that share a scale, how many layers hold as they are: NVFP4, and MXFP4, whose
# scales are powers of two.
HELD_GROUPS = (16, 32)
# A block's rows and columns where their number alone does not say it: DeepSeek's.
BLOCK = 128
# Behind a module's name: what torchao calls a weight, and what its scales are called.
QDATA = "_weight_qdata"
SCALES = ("weight_scale_inv", "weight_scale", "_weight_scale")
# Behind a module's name: scales of its inputs, which stay at 16 bits, so that they change nothing.
INPUT_SCALES = ("input_scale", "activation_scale", "input_scale_ub", "input_global_scale")

# ModelOpt's algorithms whose matrices are found by their tensors alone.
MODELOPT = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES", "MXFP8"),
    *("NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
)


@dataclass(frozen=True)
class Scaled(FloatMatrix):
    """Numbers times scales: one for all of the matrix, per row, or per block of it.

    Attributes:
        block: rows and columns that share a scale.
        scale_dtype: the type of the scales, which some have as bytes.
    """

    block: tuple[int, int]
    scale_dtype: torch.dtype

    def _scales(self, read: ReadRows, rows: range) -> Tensor:
        """float32 (R, ceil(K / columns of a block)), of some rows."""
        height, first = self.block[0], rows.start // self.block[0]
        name = self.tensors[1]
        # One for all has no rows, whatever its shape is.
        some = range(first, -(-rows.stop // height)) if height < self.shape[0] else None
        scales = read(name, some).contiguous().view(self.scale_dtype).float()
        scales = scales.reshape(1 if some is None else len(some), -1)
        return scales[torch.arange(rows.start, rows.stop) // height - first]


@dataclass(frozen=True)
class Float8(Scaled):
    """FP8: weight (N, K), E4M3 or E5M2, or the bytes of E4M3 in wider words."""

    kind = "FP8"

    def read(self, read: ReadRows, rows: range) -> Tensor:
        found = read(self.tensors[0], rows)
        dtype = found.dtype if found.dtype in FLOAT8 else torch.float8_e4m3fn
        numbers = look_up(found, torch.arange(256, dtype=torch.uint8).view(dtype).float())
        if len(self.tensors) == 1:
            return numbers
        return _times(numbers, self._scales(read, rows), self.block[1])


@dataclass(frozen=True)
class Float4(Scaled):
    """FP4 (E2M1), two in a byte: (N, K / 2), in words of bytes or wider ones.

    Attributes:
        whole: the tensor of a scale for all of the matrix; None: there is none.
        divides: whether that scale is one to divide by.
    """

    kind = "FP4"

    whole: str | None = None
    divides: bool = False

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 where what shares one is no group of them."""
        rows, columns = self.block
        grouped = rows == 1 and columns in HELD_GROUPS and self.shape[1] % columns == 0
        exponents = self.scale_dtype == torch.float8_e8m0fnu and self.whole is None
        return columns if grouped and (exponents or columns == 16) else 0

    def codes(self, read: ReadRows, rows: range) -> Tensor:
        """uint8 (R, K / 2): E2M1, the earlier one in the lower half of a byte."""
        words = read(self.tensors[0], rows).contiguous()
        return words.view(torch.uint8).view(len(rows), -1)

    def scales(self, read: ReadRows, rows: range) -> Tensor:
        """float32 (R, groups), those for all of the matrix counted in."""
        scales = self._scales(read, rows)
        if self.whole is None:
            return scales
        whole = read(self.whole, None).float().reshape(())
        return scales / whole if self.divides else scales * whole

    def read(self, read: ReadRows, rows: range) -> Tensor:
        values = torch.tensor([*E2M1, *(-value for value in E2M1)])
        codes = torch.arange(256)
        pairs = torch.stack([values[codes & 15], values[codes >> 4]], dim=1)
        numbers = look_up(read(self.tensors[0], rows), pairs)
        return _times(numbers, self.scales(read, rows), self.block[1])


def look_up(words: Tensor, table: Tensor) -> Tensor:
    """The numbers of each byte of words (R, W), one behind the other.

    Args:
        table: float32 (256,) or (256, 2), of each value of a byte.
    """
    # As one integer per byte, which torch takes from a table four times as fast.
    items = table.contiguous().view(torch.int64 if table.dim() == 2 else torch.int32).view(-1)
    found = items.index_select(0, words.contiguous().view(torch.uint8).view(-1).int())
    return found.view(torch.float32).view(len(words), -1)


def _times(numbers: Tensor, scales: Tensor, width: int) -> Tensor:
    """Numbers (R, K) times scales (R, G), each of `width` columns, in place."""
    if scales.shape[1] == 1:
        return numbers.mul_(scales)
    return numbers.mul_(scales.repeat_interleave(width, 1)[:, : numbers.shape[1]])


# Words per scale of MLX's modes, to what they hold: weights in a word, and weights per scale.
MLX_KINDS: dict[float, tuple[type[Scaled], int, int, torch.dtype]] = {
    4: (Float4, 8, 32, torch.float8_e8m0fnu),
    2: (Float4, 8, 16, torch.float8_e4m3fn),
    8: (Float8, 4, 32, torch.float8_e8m0fnu),
}


def find_floats(
    infos: Infos, read: ReadRows, block: tuple[int, int] | None = None
) -> dict[str, FloatMatrix]:
    """FP8 and FP4 by the names that compressed-tensors, ModelOpt, FBGEMM, torchao and transformers
    have.

    Args:
        block: rows and columns of FP8 that share a scale; None is as many as its scales imply.
    """
    found: dict[str, FloatMatrix] = {}
    for name, info in infos.items():
        if _is_float8(name, info):
            found[f"{_stem(name)}weight"] = _float8(infos, name, block)
        elif info.dtype == torch.uint8 and len(info.shape) == 2:
            four = _float4(infos, name)
            found |= {} if four is None else {f"{name.removesuffix('_packed')}": four}
    return found


def find_unscaled(infos: Infos, read: ReadRows) -> dict[str, FloatMatrix]:
    """FP8 of a file whose settings say of no quantization: its numbers are what they are."""
    return {
        name: Float8(_pair(info), (name,), (1, 1), torch.float32)
        for name, info in infos.items()
        if _is_float8(name, info)
    }


def _is_float8(name: str, info: TensorInfo) -> bool:
    return info.dtype in FLOAT8 and len(info.shape) == 2 and name.endswith(("weight", QDATA))


def _stem(name: str) -> str:
    """The module's name and a dot."""
    return name.removesuffix(QDATA).removesuffix("weight")


def _float8(infos: Infos, name: str, block: tuple[int, int] | None) -> Float8:
    shape, stem = _pair(infos[name]), _stem(name)
    names = [f"{stem}{scale}" for scale in SCALES]
    scale = next((each for each in names if each in infos), None)
    if scale is None:
        raise UserError(f"{name} is FP8, and there is no {names[0]} or {' or '.join(SCALES[1:])}")
    check_type(infos, scale, (*FLOATS, *EXPONENTS))
    grid = _grid(infos, scale, shape)
    if block is None or grid == (1, 1):
        block = _block(shape, grid)
    _check_grid(infos, scale, shape, block, grid)
    tensors = (name, scale, *_inputs(infos, stem))
    return Float8(shape, tensors, block, _scale_dtype(infos[scale]))


def _float4(infos: Infos, name: str) -> Float4 | None:
    """The matrix of a tensor; None where that is none of FP4, which no tensor beside it says."""
    stem = name.removesuffix("_packed").removesuffix("weight")
    scale, rows, columns = f"{stem}weight_scale", *infos[name].shape
    if not name.endswith(("weight", "weight_packed")) or scale not in infos:
        return None
    if infos[scale].dtype not in (torch.float8_e4m3fn, *EXPONENTS):
        return None
    shape = (rows, 2 * columns)
    grid = _grid(infos, scale, shape)
    block = _block(shape, grid)
    _check_grid(infos, scale, shape, block, grid)
    multiplies, divides = f"{stem}weight_scale_2", f"{stem}weight_global_scale"
    whole = [each for each in (multiplies, divides) if each in infos]
    for each in whole:
        check_type(infos, each, FLOATS)
        if torch.Size(infos[each].shape).numel() != 1:
            raise UserError(f"{each} has the shape {list(infos[each].shape)}, expected one number")
    if len(whole) != (infos[scale].dtype == torch.float8_e4m3fn):
        raise UserError(f"{name} is FP4, and beside it are {len(whole)} scales of all of it")
    tensors = (name, scale, *whole, *_inputs(infos, stem))
    dtype = _scale_dtype(infos[scale])
    return Float4(shape, tensors, block, dtype, whole[0] if whole else None, divides in whole)


def find_mlx_floats(infos: Infos, read: ReadRows) -> dict[str, FloatMatrix]:
    """MLX's modes mxfp4, nvfp4 and mxfp8: uint32 words, beside the bytes of scales alone.

    A scale is for 32 inputs, or, in nvfp4, 16; so which it is the shapes say.
    """
    found: dict[str, FloatMatrix] = {}
    for name, info in infos.items():
        stem = name.removesuffix("weight")
        scale = f"{stem}scales"
        bare = scale in infos and f"{stem}biases" not in infos
        if info.dtype != torch.uint32 or len(info.shape) != 2 or not bare:
            continue
        check_type(infos, scale, (torch.uint8,))
        (rows, words), sizes = info.shape, infos[scale].shape
        fits = len(sizes) == 2 and sizes[0] == rows and sizes[1] > 0
        kind = MLX_KINDS.get(words / sizes[1]) if fits else None
        if kind is None:
            raise UserError(f"{scale} has the shape {list(sizes)}, and {name} {list(info.shape)}")
        matrix, per_word, group, dtype = kind
        found[name] = matrix((rows, words * per_word), (name, scale), (1, group), dtype)
    return found


def find_blocks(infos: Infos, read: ReadRows) -> dict[str, FloatMatrix]:
    """MXFP4 of gpt-oss: bytes of two values, beside those of exponents, for 32 inputs each."""
    found: dict[str, FloatMatrix] = {}
    for name, info in infos.items():
        stem = name.removesuffix("blocks")
        if stem == name:
            continue
        scale = f"{stem}scales"
        if scale not in infos:
            raise UserError(f"{name} is MXFP4, and there is no {scale}")
        for each in (name, scale):
            check_type(infos, each, (torch.uint8,))
        rows, columns = info.shape[0], 2 * torch.Size(info.shape[1:]).numel()
        wanted, sizes = (rows, columns // 32), infos[scale].shape
        if sizes != wanted or columns % 32:
            raise UserError(f"{scale} has the shape {list(sizes)}, and {name} {list(info.shape)}")
        found[f"{stem}weight"] = Float4(
            (rows, columns), (name, scale), (1, 32), torch.float8_e8m0fnu
        )
    return found


def _scale_dtype(info: TensorInfo) -> torch.dtype:
    return torch.float8_e8m0fnu if info.dtype in EXPONENTS else info.dtype


def _inputs(infos: Infos, stem: str) -> Iterable[str]:
    return (stem + key for key in INPUT_SCALES if stem + key in infos)


def _pair(info: TensorInfo) -> tuple[int, int]:
    rows, columns = info.shape
    return rows, columns


def check_type(infos: Infos, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a tensor of a file that is of none of some types."""
    if infos[name].dtype not in dtypes:
        found, listed = (
            ", ".join(str(dtype).removeprefix("torch.") for dtype in each)
            for each in ((infos[name].dtype,), dtypes)
        )
        raise UserError(f"{name} is {found}, expected {listed}")


def _grid(infos: Infos, scale: str, shape: tuple[int, int]) -> tuple[int, int]:
    """How many scales there are along each dimension of a matrix."""
    sizes = infos[scale].shape
    if torch.Size(sizes).numel() == 1:
        return 1, 1
    if len(sizes) == 4 and sizes[1] == sizes[3] == 1:  # as ModelOpt has those of blocks
        sizes = sizes[::2]
    if len(sizes) not in (1, 2) or 0 in sizes:
        raise UserError(f"{scale} has the shape {list(sizes)}, its matrix {list(shape)}")
    return sizes[0], 1 if len(sizes) == 1 else sizes[1]


def _block(shape: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns that share a scale, where settings do not say."""
    sides = []
    for size, count in zip(shape, grid, strict=True):
        side = size // count if size % count == 0 else BLOCK
        sides.append(max(1, side))
    return sides[0], sides[1]


def _check_grid(
    infos: Infos, scale: str, shape: tuple[int, int], block: tuple[int, int], grid: tuple[int, int]
) -> None:
    wanted = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    if grid != wanted:
        raise UserError(
            f"{scale} has the shape {list(infos[scale].shape)}, expected {list(wanted)}: one for "
            f"{block[0]} x {block[1]} of the {shape[0]} x {shape[1]} weights"
        )


def parse_fp8(fields: Fields) -> QuantizationConfig:
    """transformers' FineGrainedFP8Config, and FbgemmFp8Config, which has a scale per row.

    https://huggingface.co/docs/transformers/quantization/finegrained_fp8
    """
    block = fields.get("weight_block_size")
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
            raise fields.error(f"weight_block_size {short(block)}", "expected two whole numbers")
        return QuantizationConfig((), None, partial(find_floats, block=(block[0], block[1])))
    return QuantizationConfig((), None, find_floats)


def parse_modelopt(fields: Fields) -> QuantizationConfig:
    """NVIDIA's: https://github.com/NVIDIA/Model-Optimizer, in config.json or a file beside it."""
    if "quantization" in fields.value:
        fields = Fields(fields.value["quantization"], f"{fields.where}.quantization")
    algorithm = fields.text("quant_algo").upper()
    fields.one_of("quant_algo", algorithm, MODELOPT)
    return QuantizationConfig((), None, find_floats)


def parse_mxfp4(fields: Fields) -> QuantizationConfig:
    """transformers' Mxfp4Config: which modules are at 16 bits, the file's tensors say as well."""
    return QuantizationConfig((), None, find_blocks)


def is_size(value: Any) -> bool:
    """Whether it is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
