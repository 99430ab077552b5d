"""Checkpoints of small floats, bit by bit in numpy, and LLM.int8(), which is of the same tool."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from foreign import Case, Folder, Writer, Written
from foreign_changes import as_mlx, moved, one_dense

# FP8 by its type: bits of the exponent and of the mantissa, and the bias.
FLOAT8 = {torch.float8_e4m3fn: (4, 3, 7), torch.float8_e5m2: (5, 2, 15)}
# Of QLoRA's paper, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = (0.0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25)


def small_floats(codes: np.ndarray, exponent: int, mantissa: int, bias: int) -> np.ndarray:
    """What floats of a sign, an exponent and a mantissa are, from their bits; none of them NaN."""
    fraction = codes & (2**mantissa - 1)
    power = (codes >> mantissa) & (2**exponent - 1)
    sign = np.where(codes >> (exponent + mantissa) & 1, -1.0, 1.0)
    one = (power > 0).astype(np.float64)
    exponents = np.maximum(power, 1) - bias
    return sign * (one + fraction / 2**mantissa) * 2.0**exponents


def draw_scales(shape: tuple[int, ...], largest: float, random: np.random.Generator) -> np.ndarray:
    return (random.uniform(0.3, 1.0, shape) / largest).astype(np.float32)


def spread(scales: np.ndarray, rows: int, columns: int, block: tuple[int, int]) -> np.ndarray:
    """The scale of each weight."""
    found = scales.astype(np.float64).repeat(block[0], 0).repeat(block[1], 1)
    return found[:rows, :columns]


def fp8(
    block: tuple[int, int] | None,
    scale: str = "weight_scale_inv",
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    powers: bool = False,
    as_type: torch.dtype = torch.float32,
    shape: Callable[[int, int], tuple[int, ...]] = lambda rows, columns: (rows, columns),
) -> Writer:
    """FP8 with a scale per block; 0 is all of a dimension, and no block no scales.

    Args:
        powers: scales are powers of two, as their exponents in bytes.
        shape: of the scales, from how many there are along each dimension.
    """

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        exponent, mantissa, bias = FLOAT8[dtype]
        low = 2 ** (exponent + mantissa)
        codes = random.integers(0, low - 2**mantissa, (rows, columns))
        codes |= random.integers(0, 2, codes.shape) * low
        weight = small_floats(codes, exponent, mantissa, bias)
        tensors = {"weight": torch.from_numpy(codes.astype(np.uint8)).view(dtype)}
        if block is None:
            return tensors, torch.from_numpy(weight)
        sides = block[0] or rows, block[1] or columns
        counts = -(-rows // sides[0]), -(-columns // sides[1])
        scales = draw_scales(counts, np.abs(weight).max(), random)
        if powers:
            exponents = np.round(np.log2(scales)).astype(np.int64)
            scales = 2.0**exponents
            found = torch.from_numpy((exponents + 127).astype(np.uint8))
        else:
            found = torch.from_numpy(scales).to(as_type)
            scales = found.float().numpy()
        tensors[scale] = found.reshape(shape(*counts))
        tensors["input_scale"] = torch.ones(1)
        return tensors, torch.from_numpy(weight * spread(scales, rows, columns, sides))

    return write


def fp4(packed: str, whole: str | None, group: int) -> Writer:
    """NVFP4, with a scale of all of the matrix, which is to divide by in compressed-tensors, and
    MXFP4, without one."""

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        codes = random.integers(0, 16, (rows, columns))
        weight = small_floats(codes, 2, 1, 1)
        tensors = {packed: torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))}
        tensors["input_scale"] = torch.full((1,), 7.0)  # which is for activations alone
        counts = rows, columns // group
        if whole is None:
            exponents = random.integers(-5, -3, counts)
            tensors["weight_scale"] = torch.from_numpy((exponents + 127).astype(np.uint8))
            scales = 2.0**exponents
        else:
            codes = random.integers(0x30, 0x78, counts)
            tensors["weight_scale"] = torch.from_numpy(codes.astype(np.uint8)).view(
                torch.float8_e4m3fn
            )
            scales = small_floats(codes, 4, 3, 7)
            number = np.float32(0.9 / 6 / scales.max())
            if whole == "weight_global_scale":
                number = np.float32(1) / number
                scales = scales / np.float64(number)
            else:
                scales = scales * np.float64(number)
            tensors[whole] = torch.tensor([number])
        return tensors, torch.from_numpy(weight * spread(scales, rows, columns, (1, group)))

    return write


def mlx_floats(mode: str) -> Writer:
    """MLX's modes of floats, in words of 32 bits."""
    group = 16 if mode == "nvfp4" else 32

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        codes = random.integers(0, 0x78 if mode == "mxfp8" else 16, (rows, columns))
        if mode == "mxfp8":
            weight, data = small_floats(codes, 4, 3, 7), codes.astype(np.uint8)
        else:
            weight = small_floats(codes, 2, 1, 1)
            data = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
        words = torch.from_numpy(np.ascontiguousarray(data).view(np.uint32))
        counts = rows, columns // group
        codes = random.integers(0x10, 0x20, counts) if mode == "nvfp4" else None
        if codes is not None:
            scales = small_floats(codes, 4, 3, 7)
        else:
            exponents = random.integers(-5, -3, counts) - (6 if mode == "mxfp8" else 0)
            scales, codes = 2.0**exponents, exponents + 127
        tensors = {"weight": words, "scales": torch.from_numpy(codes.astype(np.uint8))}
        return tensors, torch.from_numpy(weight * spread(scales, rows, columns, (1, group)))

    return write


def bitsandbytes(
    kind: str = "nf4",
    *,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
    blocksize: int = 64,
) -> Writer:
    """4 bits, in blocks of rows that lie end to end; `nested`: their scales have 8 bits each."""
    values = np.array(NF4 if kind == "nf4" else (*FP4, *(-value for value in FP4)), np.float32)

    def write(rows: int, columns: int, random: np.random.Generator) -> Written:
        count = rows * columns
        codes = random.integers(0, 16, count)
        blocks = -(-count // blocksize)
        largest = random.uniform(0.3, 0.9, blocks).astype(np.float32)
        state = {"quant_type": kind, "blocksize": blocksize, "dtype": "float16"}
        state["shape"] = [rows, columns]
        packed = torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8))
        tensors = {
            "weight": packed.view(storage)[:, None],
            "weight.absmax": torch.from_numpy(largest),
            "weight.quant_map": torch.from_numpy(values),
        }
        if nested:
            size, offset = 256, 0.55
            table = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
            outer = random.uniform(0.1, 0.4, -(-blocks // size)).astype(np.float32)
            of = random.integers(0, 256, blocks)
            largest = table[of] * outer[np.arange(blocks) // size] + np.float32(offset)
            state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
            tensors["weight.absmax"] = torch.from_numpy(of.astype(np.uint8))
            tensors["weight.nested_absmax"] = torch.from_numpy(outer)
            tensors["weight.nested_quant_map"] = torch.from_numpy(table)
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text
        weight = values[codes].astype(np.float64) * largest.repeat(blocksize)[:count]
        return tensors, torch.from_numpy(weight.reshape(rows, columns))

    return write


def int8(rows: int, columns: int, random: np.random.Generator) -> Written:
    """LLM.int8()."""
    values = random.integers(-127, 128, (rows, columns))
    largest = random.uniform(0.3, 0.9, rows).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(values.astype(np.int8)),
        "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, torch.from_numpy(values * (largest.astype(np.float64) / 127)[:, None])


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
BITS4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
BITS8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
FLOATS = r"matrices of FP8 are held at 16 bits: layers compute with no smaller floats; `bitwidth`"
BNB = FLOATS.replace("FP8", "4 bits of bitsandbytes")


def ct(layout: str, bits: int = 8, **weights: object) -> dict:
    """compressed-tensors' settings of floats, whose activations are floats, too."""
    floats = {"num_bits": bits, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": floats | weights,
        "input_activations": floats | {"strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": layout,
    }
    cache = floats | {"strategy": "tensor", "dynamic": False}
    return {
        **{"quant_method": "compressed-tensors", "format": layout, "kv_cache_scheme": cache},
        **{"config_groups": {"group_0": group}, "ignore": ["lm_head"]},
    }


def as_producer(folder: Folder) -> None:
    """ModelOpt's own file, and nothing in config.json."""
    moved(folder, "hf_quant_config.json")
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}
    folder.beside["hf_quant_config.json"] = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": quantization | {"exclude_modules": ["lm_head"]},
    }


def as_linears(folder: Folder) -> None:
    """GPT-2's matrices are as those of other families then, its own are transposed."""
    write, random = bitsandbytes(), np.random.default_rng(1)
    for name, module in folder.twin.named_modules():
        if type(module).__name__ == "Conv1D":
            tensors, weight = write(*module.weight.shape[::-1], random)
            module.weight.data = weight.float().t().contiguous()
            del folder.state[f"{name}.weight"]
            folder.state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}


CASES = {
    "FP8 in blocks": Case(fp8((32, 16)), FP8 | {"weight_block_size": [32, 16]}, note=FLOATS),
    "FP8 in blocks that do not divide it": Case(
        fp8((40, 24), as_type=torch.bfloat16), FP8 | {"weight_block_size": [40, 24]}, note=FLOATS
    ),
    "FP8, one scale": Case(
        fp8((0, 0), shape=lambda rows, columns: ()), FP8 | {"weight_block_size": None}, note=FLOATS
    ),
    "FP8, powers of two": Case(
        fp8((1, 32), powers=True),
        FP8 | {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        note=FLOATS,
    ),
    "FP8 of FBGEMM": Case(
        fp8((1, 0), "weight_scale"), {"quant_method": "fbgemm_fp8"}, family="opt", note=FLOATS
    ),
    "FP8, BLOOM": Case(fp8((1, 0)), FP8, family="bloom", note=FLOATS),
    "FP8, Phi-3": Case(fp8((1, 0)), FP8, family="phi3", note=FLOATS),
    "FP8 of ModelOpt": Case(
        fp8((0, 0), "weight_scale", shape=lambda rows, columns: (1,)), MODELOPT, note=FLOATS
    ),
    "FP8 of ModelOpt, in blocks": Case(
        fp8((32, 32), "weight_scale", shape=lambda rows, columns: (rows, 1, columns, 1)),
        MODELOPT | {"quant_algo": "fp8_pb_wo"},
        note=FLOATS,
    ),
    "NVFP4 of ModelOpt": Case(
        fp4("weight", "weight_scale_2", 16), MODELOPT | {"quant_algo": "NVFP4"}
    ),
    "NVFP4 of ModelOpt, settings in their own file": Case(
        fp4("weight", "weight_scale_2", 16), MODELOPT, as_producer
    ),
    "E5M2": Case(fp8((1, 0), dtype=torch.float8_e5m2), FP8, note=FLOATS),
    "FP8 of compressed-tensors": Case(
        fp8((1, 0), "weight_scale", as_type=torch.bfloat16),
        ct("float-quantized", strategy="channel"),
        note=FLOATS,
    ),
    "FP8 of compressed-tensors, one scale": Case(
        fp8((0, 0), "weight_scale", shape=lambda rows, columns: (1,)),
        ct("naive-quantized", strategy="tensor"),
        note=FLOATS,
    ),
    "FP8 of compressed-tensors, in blocks": Case(
        fp8((32, 16), "weight_scale"),
        ct("float-quantized", strategy="block", block_structure=[32, 16]),
        note=FLOATS,
    ),
    "MXFP8 of compressed-tensors": Case(
        fp8((1, 32), "weight_scale", powers=True), ct("mxfp8-quantized", group_size=32), note=FLOATS
    ),
    "NVFP4 of compressed-tensors": Case(
        fp4("weight_packed", "weight_global_scale", 16),
        ct("nvfp4-pack-quantized", 4, strategy="tensor_group", group_size=16),
    ),
    "NVFP4 of compressed-tensors, one of q, k and v at 16 bits": Case(
        fp4("weight_packed", "weight_global_scale", 16),
        ct("nvfp4-pack-quantized", 4, strategy="tensor_group", group_size=16),
        partial(one_dense, linear="self_attn.q_proj"),
        note=FLOATS.replace("FP8", "FP4"),
    ),
    "MXFP4 of compressed-tensors": Case(
        fp4("weight_packed", None, 32), ct("mxfp4-pack-quantized", 4, group_size=32)
    ),
    "FP8 without settings": Case(fp8(None), None, note=FLOATS),
    "FP8 without settings, but scales": Case(
        fp8((1, 0)), None, error=r"_proj\.(weight_scale_inv|input_scale), which no llama of its"
    ),
    "FP8 without scales": Case(
        fp8(None), FP8, error=r"_proj\.weight is FP8, and there is no .*_proj\.weight_scale_inv"
    ),
    "FP8 in other blocks than it says": Case(
        fp8((32, 16)),
        FP8 | {"weight_block_size": [16, 16]},
        error=r"_scale_inv has the shape \[\d, \d\], expected \[\d, \d\]: one for 16 x 16 of the",
    ),
    "NF4": Case(bitsandbytes(), BITS4, note=BNB),
    "NF4, OPT": Case(bitsandbytes(nested=True), BITS4, family="opt", note=BNB),
    "NF4, BLOOM": Case(bitsandbytes(), BITS4, family="bloom", note=BNB),
    "NF4, GPT-2": Case(None, BITS4, as_linears, family="gpt2", note=BNB),
    "NF4, blocks that rows do not end with": Case(bitsandbytes(blocksize=128), BITS4, note=BNB),
    "NF4, scales of 8 bits": Case(bitsandbytes(nested=True), BITS4, note=BNB),
    "NF4 in bfloat16": Case(bitsandbytes(storage=torch.bfloat16), BITS4, note=BNB),
    "FP4 of bitsandbytes": Case(bitsandbytes("fp4"), BITS4, note=BNB),
    "LLM.int8()": Case(int8, BITS8),
    "LLM.int8(), OPT": Case(int8, BITS8, family="opt"),
    **{
        f"MLX, {mode}": Case(
            mlx_floats(mode), None, as_mlx(mlx_floats(mode), 4, mode=mode), note=note
        )
        for mode, note in (("mxfp4", ""), ("nvfp4", ""), ("mxfp8", FLOATS))
    },
}
