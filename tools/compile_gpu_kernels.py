"""What the GPU kernels compile to, for any GPU, on a machine that has none.

    python3 -m tools.compile_gpu_kernels 80 90
    python3 -m tools.compile_gpu_kernels 90 packed-3 "layer norm"

prints a line of JSON for each compute capability and each kernel, or each whose name begins as one
of the words: registers of a thread, bytes of them that did not fit (stack) and of shared memory,
the matrix instructions, how many take registers, and whether each waits for the last one; stores to
shared memory, whether it waits for the kernel in front, how often it reads or writes before that,
instructions that do not round as IEEE 754 says, or not after each step, and the numbers by which
others round.
Triton must not be told to interpret.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qllm.ops.gpu import prefill, tiles, tuning
from qllm.ops.gpu.attention import DESCRIBING, block_of, prefill_tile
from qllm.ops.gpu.kernels import (
    attention,
    descent,
    embedding,
    matmul,
    prefill_matmul,
    quantized_prefill,
    rows,
)
from qllm.ops.gpu.kernels import prefill as prefill_attention
from tools.disassemble import disassemble

BITS = (3, 4, 8)
INSTRUCTIONS = ("HGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTMALDG")
NEAREST = "0f4B400000", "0fCB400000"  # 1.5 · 2^23 and less that, which round to integers
# A matrix unit's product whose first operand is in registers.
OF_REGISTERS = re.compile(r"\bHGMMA\S* R\d+, R\d+, gdesc")
INEXACT = re.compile(
    r"\b(?:fma\.rn\.f32|[a-z0-9]+\.(?:full|approx)\.[.a-z0-9]+|[.a-z0-9]+\.ftz\b|cvt\.r[zmp]\.\S+)"
)
EARLY = 90  # the first whose kernels can begin before the one in front has ended
ALIGNED = ("inputs", "x_stride")  # numbers that are multiples of 16 in any model


class Job(NamedTuple):
    """A kernel, the types of its tensors by name, its constants, and how it is launched.

    Attributes:
        fusion: products and sums may be contracted, see `enable_fp_fusion` at the launch.
    """

    name: str
    kernel: triton.JITFunction
    tensors: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int
    fusion: bool


def products(capability: str) -> Iterator[Job]:
    """Products, in the tiles for few rows and for many."""
    common = {"x": "*bf16", "bias": "*bf16", "y": "*bf16", "counters": "*i32", "partials": "*fp32"}
    packed = {"q": "*i32", "scales": "*fp16", "zeros": "*u8"}
    int8 = {"x": "*i8", "x_scales": "*fp32", "weight": "*i8", "scales": "*fp16", "partials": "*i32"}
    kinds = [
        (f"packed-{bits}", matmul.packed_matmul, packed, {"BITS": bits, "SPAN": 128})
        for bits in BITS
    ]
    kinds.append(("dense", matmul.dense_matmul, {"weight": "*bf16"}, {"BK": 64}))
    kinds.append(("int8", matmul.int8_matmul, int8, {"BK": 128, "PER_ROW": True}))
    for kind, kernel, tensors, constants in kinds:
        for count in (tiles.ROWS[0], tiles.ROWS[-1]):
            tile = tiles.tile_of(kind, count, capability)
            cut = {
                "SPLIT_K": 4,
                "PARALLEL": count == tiles.ROWS[0],
                "BM": tile.rows,
                "BN": tile.columns,
            }
            if kind.startswith("packed"):
                cut |= {"GROUP_BLOCKS": 1, "HAS_ZEROS": True, "OFFSETS": False}
            every = constants | cut | {"HAS_BIAS": True}
            name = f"{kind}, {count} rows"
            how = (tile.warps, tile.stages, kind != "int8")
            if not kind.startswith("packed"):
                yield Job(name, kernel, common | tensors, every, *how)
                continue
            yield Job(name, kernel, common | tensors, every | {"UNPACKED": False}, *how)
            if kind == "packed-4":
                offsets = common | tensors | {"zeros": "*fp16"}
                instead = {"HAS_ZEROS": False, "OFFSETS": True, "SPAN": 32, "UNPACKED": False}
                exact = (*how[:2], False)
                yield Job(f"offsets, {name}", kernel, offsets, every | instead, *exact)
            if kind == "packed-4" and not cut["PARALLEL"]:
                unpacked = common | tensors | {"q": "*bf16"}
                yield Job(f"{name}, unpacked", kernel, unpacked, every | {"UNPACKED": True}, *how)
    tensors = {"q": "*i32", "scales": "*fp16", "zeros": "*u8", "unpacked": "*bf16"}
    constants = {
        "BITS": 4,
        "SPAN": 128,
        "GROUP_BLOCKS": 1,
        "HAS_ZEROS": True,
        "OFFSETS": False,
        "BN": 64,
    }
    yield Job("unpacking", matmul.unpack_weight, tensors, constants, 4, 1, False)


def in_float32(capability: str) -> Iterator[Job]:
    """What is multiplied without matrix units."""
    tensors = dict.fromkeys(("x", "weight", "bias", "y", "partials"), "*fp32")
    tensors |= {"counters": "*i32"}
    for count in tiles.ROWS:
        tile = tiles.tile_of("dense-float32", count, capability)
        constants = {"BK": 64, "HAS_BIAS": True, "SPLIT_K": 4, "PARALLEL": count == tiles.ROWS[0]}
        constants |= {"BM": tile.rows, "BN": tile.columns}
        how = (tile.warps, tile.stages, True)
        yield Job(f"float32, {count} rows", matmul.dense_matmul, tensors, constants, *how)
    packed = tensors | {"q": "*i32", "scales": "*fp16", "zeros": "*u8"}
    every = {name: value for name, value in constants.items() if name != "BK"}
    every |= {"BITS": 4, "SPAN": 128, "GROUP_BLOCKS": 1, "HAS_ZEROS": True, "OFFSETS": False}
    every |= {"UNPACKED": False}
    yield Job("float32, packed-4", matmul.packed_matmul, packed, every, *how)
    names = ("qkv", "cos", "sin", "keys", "values", "own_keys", "own_values", "slopes")
    tensors = dict.fromkeys((*names, "sinks", "y"), "*fp32")
    tensors |= dict.fromkeys(("rows", "starts", "positions"), "*i64")
    run = prefill_attention.prefill_attention
    for dim, runs in ((128, False), (256, False), (128, True)):
        width, *cut, warps, stages = prefill_tile(dim, torch.float32, False, runs=runs)
        constants = {"DIM": dim, "FIRST": dim // 2, "WIDTH": width, "GROUP": 1, "BM": cut[0]}
        constants |= {"BN": cut[1], "ROTATE": True, "SLOPE": not runs, "CAP": not runs}
        constants |= {"SINK": runs}
        constants |= {"WINDOW": not runs, "RUNS": runs, "DESCRIBED": False}
        name = f"float32, attention, heads of {dim}{', to runs' if runs else ''}"
        yield Job(name, run, tensors, constants, warps, stages, True)


def prompts(capability: str) -> Iterator[Job]:
    """Products of prompts with packed weights, where there are tensor descriptors."""
    if tuple(map(int, capability.split("."))) < prefill.OLDEST:
        return
    tensors = {"x": "*bf16", "q": "*i32", "scales": "*fp16", "zeros": "*u8"}
    tensors |= dict.fromkeys(("bias", "y", "weight"), "*bf16")
    constants = {"SPAN": 128, "GROUP_BLOCKS": 1, "HAS_ZEROS": True, "OFFSETS": False}
    few = prefill_matmul.few_rows_matmul
    for bits, count in ((4, 16), (4, 256), (3, 256), (8, 256)):
        tile = tiles.tile_of("prefill", count, capability)
        cut = {"BITS": bits, "HAS_BIAS": True, "BM": tile.rows, "BN": tile.columns}
        how = (tile.warps, tile.stages, False)
        yield Job(f"prompts-{bits}, {count} rows", few, tensors, constants | cut, *how)
    instead = {"HAS_ZEROS": False, "OFFSETS": True, "SPAN": 32}
    offsets = tensors | {"zeros": "*fp16"}
    yield Job(f"prompts-{bits}, offsets", few, offsets, constants | cut | instead, *how)
    constants |= {"BITS": 4, "BN": prefill.AT_ONCE}
    run = prefill_matmul.dequantize_weight
    yield Job("dequantizing", run, tensors, constants, 4, 3, False)
    cut = [tiles.tile_of("dense_prefill", rows, capability) for rows in (16, 64)]
    cut += [tiles.Tile(n, prefill.OUTPUTS, prefill.WARPS, prefill.STAGES) for n in prefill.ROWS]
    for tile in cut:
        sizes = {"BM": tile.rows, "BN": tile.columns, "BK": prefill.INPUTS, "HAS_BIAS": True}
        described = tensors | {
            "x": f"tensordesc<bf16[{tile.rows}, {prefill.INPUTS}]>",
            "weight": f"tensordesc<bf16[{tile.columns}, {prefill.INPUTS}]>",
        }
        run = prefill_matmul.many_rows_matmul
        how = (tile.warps, tile.stages, True)
        yield Job(f"prompts, {tile.rows} rows", run, described, sizes, *how)


def others(capability: str) -> Iterator[Job]:
    """What is no product."""
    names = ("qkv", "cos", "sin", "keys", "values", "y")
    tensors = dict.fromkeys(names, "*bf16")
    tensors |= dict.fromkeys(("rows", "starts", "positions"), "*i64")
    tensors |= {
        "slopes": "*fp32",
        "sinks": "*fp32",
        "partials": "*fp32",
        "counters": "*i32",
        "q": "*bf16",
    }
    for dim, dtype in ((64, "bf16"), (128, "bf16"), (256, "fp32")):
        constants = {"DIM": dim, "FIRST": dim // 2, "COLUMNS": dim, "GROUP": 1, "SPLIT": True}
        constants |= {
            "PADDED_GROUP": 16,
            "SPAN": 256,
            "BLOCK": block_of(dim, torch.float32 if dtype == "fp32" else torch.bfloat16),
            "ROTATE": True,
            "SLOPE": False,
            "SINK": True,
            "CAP": False,
            "WINDOW": True,
            "JOINED": 1,
            "AT_ONCE": 16,
            "LATE": True,
        }
        for bits in (16, 8, 4) if dtype == "bf16" else (16,):
            every = constants | {"BITS": bits, "WIDTH": dim}
            codes = tensors | dict.fromkeys((*names, "q"), f"*{dtype}")
            codes |= {"key_scales": "*bf16", "value_scales": "*bf16"}
            codes |= dict.fromkeys(("key_codes", "value_codes", "key_zeros", "value_zeros"), "*u8")
            name = f"attention, heads of {dim}, keys and values of {bits} bits"
            yield Job(name, attention.decode_attention, codes, every, 4, 2, True)
    constants = {"DIM": 128, "FIRST": 64, "WIDTH": 128, "KV_HEADS": 8, "ROTATE": True}
    yield Job("writing heads", prefill_attention.write_tokens, tensors, constants, 2, 1, True)
    described = capability.partition(".")[0] in DESCRIBING
    for runs, window in ((False, False), (False, True), (True, False)):
        width, tokens, keys, warps, stages = prefill_tile(128, torch.bfloat16, described)
        constants = {"DIM": 128, "FIRST": 64, "WIDTH": width, "GROUP": 1, "BM": tokens, "BN": keys}
        constants |= {"ROTATE": True, "SLOPE": not window, "CAP": False, "WINDOW": window}
        constants |= {"RUNS": runs, "DESCRIBED": described, "SINK": window}
        blocks = f"tensordesc<bf16[{keys}, {width}]>" if described else "*bf16"
        sources = dict.fromkeys(("keys", "values", "own_keys", "own_values"), blocks)
        what = "to runs" if runs else "in a window" if window else "of prefill"
        run = prefill_attention.prefill_attention
        yield Job(f"attention {what}", run, tensors | sources, constants, warps, stages, True)
    yield from quantized_prefills(tensors)
    tensors = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "scales": "*fp32"}
    tensors |= {"z": "*bf16", "sums": "*bf16", "out": "*i8", "y": "*bf16"}
    for name, gated in (("silu", True), ("gelu_tanh", False)):
        constants = {"NAME": name, "GATED": gated, "BLOCK": 1024, "LATE": True}
        yield Job(f"activation, {name}", rows.activate, tensors, constants, 4, 3, True)
    constants = {"WIDTH": 4096, "HAS_WEIGHT": True, "HAS_BIAS": True, "STATIC": False}
    constants |= {"RUN": 0, "FIRST": 0, "SECOND": 0, "THIRD": 0, "LATE": True}
    for name, norm in (("rows", 0), ("layer norm", 1)):
        every = constants | {"NORM": norm, "ADD": norm > 0, "QUANTIZE": True}
        yield Job(f"{name} to int8", rows.norm_rows, tensors, every, 8, 1, False)
    tables = {"index": "*i64", "q": "*i32", "scales": "*fp16", "zeros": "*u8", "out": "*bf16"}
    constants_of = {"BITS": 7, "GROUP": 128, "PADDED": 128, "HAS_ZEROS": True, "OFFSETS": False}
    yield Job(
        "embedding", embedding.look_up_rows, tables, constants_of | {"AT_ONCE": 256}, 4, 1, False
    )
    names = ("products", "values", "gradient", "scales", "low", "step_sizes", "out")
    descended, cut = dict.fromkeys(names, "*fp32") | {"qmax": "fp32"}, {"BN": tuning.ROWS}
    cut |= {"CHANNELS": tuning.MAX_CHANNELS}
    yield Job("descent", descent.descend_block, descended, cut, tuning.WARPS, 1, False)
    chunks = {"CHUNK": 4096, "FUSED": True}
    yield Job("long rows to bytes", rows.quantize_rows, tensors, chunks, 16, 1, False)
    every = constants | {"NORM": 2, "ADD": True, "QUANTIZE": False}
    yield Job("sum and RMS norm", rows.norm_rows, tensors | {"out": "*bf16"}, every, 8, 1, False)
    every |= {"WIDTH": 128, "ADD": False, "HAS_BIAS": False, "RUN": 40, "FIRST": 32, "SECOND": 4}
    every["THIRD"] = 4
    yield Job("norms of heads", rows.norm_rows, tensors | {"out": "*bf16"}, every, 1, 1, False)


def quantized_prefills(tensors: dict[str, str]) -> Iterator[Job]:
    """Attention of prefill to integers, for types of tensors of attention."""
    tensors = tensors | dict.fromkeys(("recent_keys", "recent_values"), "*bf16")
    tensors |= {"key_scales": "*bf16", "value_scales": "*bf16"}
    tensors |= dict.fromkeys(("key_codes", "value_codes", "key_zeros", "value_zeros"), "*u8")
    constants = {"DIM": 128, "FIRST": 64, "COLUMNS": 128, "KV_HEADS": 8, "ROTATE": True}
    yield Job("writing runs", quantized_prefill.write_runs, tensors, constants, 2, 1, False)
    for bits in (8, 4):
        name = f"keys and values of {bits} bits"
        constants = {"DIM": 128, "CHANNELS": 128, "WIDTH": 128, "BITS": bits}
        run = quantized_prefill.quantize_runs
        yield Job(f"quantizing runs, {name}", run, tensors, constants, 4, 1, False)
        constants = {"DIM": 128, "COLUMNS": 128, "WIDTH": 128, "BITS": bits, "WINDOW": True}
        words = dict.fromkeys(("key_codes", "value_codes"), "*i32")
        run = quantized_prefill.dequantize_runs
        yield Job(f"dequantizing runs, {name}", run, tensors | words, constants, 4, 1, True)


def build(job: Job, capability: int) -> dict[str, object]:
    """Compile a kernel, and say what came of it."""
    if capability < EARLY and "LATE" in job.constants:
        job = job._replace(constants=job.constants | {"LATE": False})
    names = job.kernel.arg_names
    numbers = {"scale": "fp32", "eps": "fp32", "offset": "fp32", "cap": "fp32"}
    types = {
        name: "constexpr" if name in job.constants else {**numbers, **job.tensors}.get(name, "i32")
        for name in names
    }
    constants = {(names.index(name),): value for name, value in job.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if job.tensors.get(name, "").startswith("*") or name in ALIGNED
    }
    source = ASTSource(fn=job.kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": job.warps,
        "num_stages": job.stages,
        "enable_fp_fusion": job.fusion,
    }
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, code = disassemble(built.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "kernel": job.name,
        "capability": capability,
        "registers": int(registers),
        "stack": int(stack),
        "shared": built.metadata.shared,
        "instructions": [name for name in INSTRUCTIONS if name in code],
        "inexact": sorted(set(INEXACT.findall(built.asm["ptx"]))),
        "nearest": [built.asm["ptx"].count(number) for number in NEAREST],
        "of_registers": len(OF_REGISTERS.findall(code)),
        "stores": len(re.findall(r"\bSTSM?\b", code)),
        "waits": "ACQBULK" in code,
        # The compiler lets each product wait for the last where it moves what they sum up.
        "one_by_one": 2 * code.count("WARPGROUP.DEPBAR") > code.count("HGMMA") > 0,
        "before": len(re.findall(r"\b(?:LDG|STG|ATOMG)\b", code.partition("ACQBULK")[0])),
    }


def main() -> None:
    capabilities = [int(word) for word in sys.argv[1:] if word.isdecimal()]
    names = tuple(word for word in sys.argv[1:] if not word.isdecimal()) or ("",)
    for capability in capabilities:
        name = f"{capability // 10}.{capability % 10}"
        for job in (*products(name), *in_float32(name), *prompts(name), *others(name)):
            if job.name.startswith(names):
                print(json.dumps(build(job, capability)), flush=True)


if __name__ == "__main__":
    main()
