"""Weights in each format of quantized checkpoints, drawn and written."""

from __future__ import annotations

import numpy as np
import torch

from qllm.checkpoint.formats import FORMATS
from qllm.config import QuantSpec
from qllm.ops.reference import dequantize
from qllm.quant.packing import PackedWeight, pack, unpack

SCHEMES = ("sym", "asym")


def weight_only(name: str, bits: int, group_size: int, **settings: bool):
    return FORMATS[name](QuantSpec(bits, group_size, "asym", "weight_only"), **settings)


def to_gptq(weight, bits, group_size, columns):
    return weight_only("gptq", bits, group_size).write(weight, columns)


def from_gptq(tensors, bits, group_size, columns, rows, *, v1):
    return weight_only("gptq", bits, group_size, v1=v1).read(tensors, columns, rows)


def from_awq(tensors, group_size, columns, rows):
    return weight_only("awq", 4, group_size).read(tensors, columns, rows)


def to_pack_quantized(weight, bits, group_size, columns):
    return weight_only("pack-quantized", bits, group_size).write(weight, columns)


def from_pack_quantized(tensors, bits, group_size, columns, rows):
    return weight_only("pack-quantized", bits, group_size).read(tensors, columns, rows)


def from_int_quantized_weight(tensors, bits, group_size, columns, rows):
    return weight_only("int-quantized", bits, group_size).read(tensors, columns, rows)


def to_int_quantized(weight):
    spec = QuantSpec(8, -1, "sym", "w8a8_dynamic")
    return FORMATS["int-quantized"](spec).write(weight, weight.qweight.shape[1])


def from_int_quantized(tensors, columns, rows, *, static):
    spec = QuantSpec(8, -1, "sym", "w8a8_static" if static else "w8a8_dynamic")
    return FORMATS["int-quantized"](spec).read(tensors, columns, rows)


def from_bitnet(tensors, columns, rows, *, inverse=True):
    spec = QuantSpec(2, -1, "sym", "weight_only")
    return FORMATS["bitnet"](spec, inverse).read(tensors, columns, rows)


def from_hqq(tensors, bits, group_size, columns, rows):
    spec = QuantSpec(bits, group_size, "offset", "weight_only")
    return FORMATS["hqq"](spec).read(tensors, columns, rows)


def from_torchao(tensors, spec, columns, rows):
    return FORMATS["torchao"](spec).read(tensors, columns, rows)


def from_torchao_int4(tensors, group_size, columns, rows):
    spec = QuantSpec(4, group_size, "offset", "weight_only")
    return FORMATS["torchao-int4"](spec).read(tensors, columns, rows)


# N, K and group size: whole blocks of 32; one group, or row; primes; a short last group; a group
# longer than a row.
SHAPES = (
    (64, 96, 32),
    (32, 64, -1),
    (1, 64, 32),
    (1, 1, 1),
    (7, 13, 5),
    (33, 31, -1),
    (8, 40, 16),
    (5, 64, 128),
    (40, 72, 24),
)


def drawn(rows: int, columns: int, bits: int, group_size: int, scheme: str, seed: int = 0):
    """A matrix of random integers and zero points, 0 and 2^b - 1 among them."""
    random = np.random.default_rng([seed, rows, columns, bits])
    groups = 1 if group_size == -1 else -(-columns // group_size)
    values = torch.from_numpy(random.integers(0, 2**bits, (rows, columns), dtype=np.uint8))
    scales = torch.from_numpy(random.uniform(0.01, 1, (rows, groups)).astype(np.float16))
    zeros = torch.empty(0, dtype=torch.uint8)
    if scheme == "asym":
        zeros = torch.from_numpy(random.integers(0, 2**bits, (rows, groups), dtype=np.uint8))
        zeros[0, 0] = 0  # at every width other than the middle, which would be a symmetric grid
    return PackedWeight(pack(values, bits), scales, zeros)


def float_weight(weight: PackedWeight, bits: int, group_size: int, columns: int) -> torch.Tensor:
    """The matrix, with input channels in their own order."""
    found = dequantize(*weight[:3], bits, group_size, columns, torch.float32)
    if weight.perm is not None:
        found[:, weight.perm] = found.clone()
    return found


def assert_same(found: PackedWeight, expected: PackedWeight) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
            assert a.is_contiguous()


def stream(words: np.ndarray, bits: int, count: int) -> list[int]:
    """The values of one little-endian stream of words, taken out of one long number."""
    number = sum(int(word) << (32 * i) for i, word in enumerate(words.view(np.uint32)))
    return [(number >> (bits * i)) & (2**bits - 1) for i in range(count)]


def words(*values: int) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.int32))


def scattered(weight: PackedWeight, columns: int, group_size: int, seed: int) -> PackedWeight:
    """The same integers, said to belong to other input channels."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(columns))
    # Within a group the channels stay sorted, which is how a g_idx is read.
    return weight._replace(perm=torch.cat([run.sort().values for run in order.split(group_size)]))


def awq_tensors(weight: PackedWeight, columns: int) -> dict[str, torch.Tensor]:
    """As AutoAWQ's WQLinear_GEMM packs: a loop over words and over the nibbles of each."""

    def words_of(values: np.ndarray) -> torch.Tensor:
        out = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
        for word in range(out.shape[1]):
            for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[:, word] |= values[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(out.view(np.int32))

    return {
        "qweight": words_of(unpack(weight.qweight, 4, columns).t().numpy()),
        "qzeros": words_of(weight.qzeros.t().numpy()),
        "scales": weight.scales.t().contiguous(),
    }
