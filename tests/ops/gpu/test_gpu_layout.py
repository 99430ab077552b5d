"""The layout of packed weights on a GPU, made in torch ops, and the rows that a kernel looks up."""

from __future__ import annotations

import pytest
import torch
from cpu_paths import DTYPES, STORED_SCHEMES, random_weight
from gpu_kernels import packed
from hypothesis import given
from hypothesis import strategies as st

from qllm.ops.gpu import layout
from qllm.ops.gpu.layout import BLOCK, PANEL, Shape
from qllm.ops.reference import packed_embedding
from qllm.quant.packing import BITS, PackedWeight
from qllm.quant.packing import pack as pack_rows


def stored(values: torch.Tensor, bits: int, groups: int, *, zeros: bool = True) -> PackedWeight:
    rows, count = len(values), groups
    scales = torch.arange(1, rows * count + 1).view(rows, count).half()
    qzeros = torch.arange(rows * count).view(rows, count) % 2**bits
    qzeros = qzeros.to(torch.uint8) if zeros else torch.empty(0, dtype=torch.uint8)
    return PackedWeight(pack_rows(values, bits), scales, qzeros)


@given(
    rows=st.integers(1, 130),
    columns=st.integers(1, 300),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((-1, 1, 16, 20, 32, 100, 128, 200)),
    zeros=st.booleans(),
)
def test_there_is_a_way_back(rows, columns, bits, group_size, zeros):
    shape = Shape.of(columns, rows, group_size)
    values = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    weight = stored(values, bits, shape.groups, zeros=zeros)
    packed = layout.pack(weight, bits, group_size, columns)
    size = layout.packed_nbytes(weight, bits, group_size, columns)
    assert size == sum(tensor.nbytes for tensor in packed[:3])
    back = layout.unpack(packed, bits, group_size, columns, rows)
    for got, expected in zip(back[:3], weight[:3], strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_large_weights_are_repacked_in_parts(monkeypatch):
    values = torch.randint(0, 8, (3 * PANEL + 5, 150), dtype=torch.uint8)
    weight = stored(values, 3, 5)
    whole = layout.pack(weight, 3, 32, 150)
    monkeypatch.setattr(layout, "CHUNK", 1)
    parts = layout.pack(weight, 3, 32, 150)
    assert torch.equal(whole.qweight, parts.qweight)
    assert torch.equal(layout.unpack(parts, 3, 32, 150, len(values)).qweight, weight.qweight)


def test_the_bits_of_a_block():
    # Of a panel's block of 3 bits: the lower two bits of all values, then the highest. Lane 4 g + t
    # has of rows g and g + 8 the inputs 8 t to 8 t + 7 of each 32, the second of a pair 16 bits up.
    values = torch.zeros(9, 128, dtype=torch.uint8)
    values[0, 0] = 0b111  # lane 0, pair 0, first
    values[0, 11] = 0b010  # lane 1, pair 1, second
    values[8, 32] = 0b101  # lane 0, second half of its words, pair 4, first
    packed = layout.pack(stored(values, 3, 1), 3, 128, 128)
    assert packed.qweight.shape == (1, 1, 64 * 3)
    words, third = packed.qweight[0, 0].split([128, 64])
    assert words[0] == 0b11 and third[0] == 1
    assert words[4] == 0b10 << 16 + 2
    assert words[2] == 0b01 << 4 * 2 and third[1] == 1 << 4
    assert packed.qweight.count_nonzero() == 5
    scales = packed.scales.view(8, 2)  # of rows g and g + 8
    assert scales[0].tolist() == [1, 9] and scales[1].tolist() == [2, 0]


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_takes_as_many_bytes_as_its_bits(bits):
    weight = stored(torch.zeros(256, 1024, dtype=torch.uint8), bits, 8)
    assert layout.pack(weight, bits, 128, 1024).qweight.nbytes == 256 * 1024 * bits // 8


@pytest.mark.parametrize(
    ("group_size", "padded_size", "span"),
    [
        (-1, 1024, BLOCK),
        (16, 32, 32),
        (32, 32, 32),
        (48, 64, 64),
        (100, 128, BLOCK),
        (200, 256, BLOCK),
    ],
)
def test_the_padded_size_of_a_group(group_size, padded_size, span):
    shape = Shape.of(1000, 64, group_size)
    assert (shape.padded_size, shape.span) == (padded_size, span)
    assert shape.pads_groups == (group_size not in (-1, 32))


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [-1, 16, 20, 32, 100, 128])
@pytest.mark.parametrize("scheme", STORED_SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_looked_up(bits, scheme, group_size, dtype, gpu):
    rows, columns = 37, 290
    wide = (torch.float16, torch.float32)[bits % 2]
    weight = random_weight((rows, columns), bits, group_size, scheme, wide)
    tensors = packed(weight, gpu)
    index = torch.tensor([36, 0, 8, 15, 16, 7, 36])
    shape = (bits, group_size, columns)
    want = packed_embedding(index, weight.stored, *shape, dtype)
    got = layout.look_up(index.to(gpu), tensors, *shape, rows, dtype)
    assert got.dtype == dtype and torch.equal(got.cpu(), want)
    assert layout.look_up(index[:0].to(gpu), tensors, *shape, rows, dtype).shape == (0, columns)
