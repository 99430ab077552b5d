"""Others' tensors: written by hand, and decoded bit by bit; both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from stored_formats import (
    SCHEMES,
    SHAPES,
    assert_same,
    awq_tensors,
    drawn,
    float_weight,
    from_awq,
    from_bitnet,
    from_gptq,
    from_hqq,
    from_int_quantized,
    from_int_quantized_weight,
    from_pack_quantized,
    from_torchao,
    from_torchao_int4,
    scattered,
    stream,
    to_gptq,
    to_pack_quantized,
    words,
)

from qllm.config import QuantSpec
from qllm.quant.packing import BITS, pack, packed_size, unpack


def gptq_decoder(tensors: dict, bits: int, columns: int, rows: int, v1: bool) -> torch.Tensor:
    """(N, K) of a GPTQ layer: weight[n, k] = (q[k, n] - zero[g_idx[k], n]) * scale[g_idx[k], n]."""
    t = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
    zeros = np.array([stream(row, bits, rows) for row in t["qzeros"]])
    if v1:
        zeros = zeros + 1
    out = np.empty((rows, columns), dtype=np.float32)
    for n in range(rows):
        column = stream(np.ascontiguousarray(t["qweight"][:, n]), bits, columns)
        for k, (value, group) in enumerate(zip(column, t["g_idx"], strict=True)):
            out[n, k] = np.float32(value - zeros[group, n]) * np.float32(t["scales"][group, n])
    return torch.from_numpy(out)


def test_gptq_by_hand():
    """Eight input channels of 4 bits in one word, the first in its lowest bits; two groups."""
    tensors = {
        "qweight": words(0x87654321, 0xFEDCBA90).reshape(1, 2),
        "qzeros": words(0x0F8, 0x028).reshape(2, 1),
        "scales": torch.tensor([[0.5, 1.0], [2.0, 0.25]], dtype=torch.float16),
        "g_idx": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.int32),
    }
    weight = from_gptq(tensors, 4, 4, 8, 2, v1=False)
    assert weight.qweight.shape == (2, packed_size(8, 4))
    assert unpack(weight.qweight, 4, 8).tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8],
        [0, 9, 10, 11, 12, 13, 14, 15],
    ]
    assert weight.scales.tolist() == [[0.5, 2.0], [1.0, 0.25]]
    assert weight.qzeros.tolist() == [[8, 8], [15, 2]]
    assert weight.perm is None
    for name, tensor in to_gptq(weight, 4, 4, 8).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    # One less in the file, but for the 15, which is 14 there.
    v1 = from_gptq(tensors | {"qzeros": words(0x0E7, 0x017).reshape(2, 1)}, 4, 4, 8, 2, v1=True)
    assert_same(v1, weight)


def test_gptq_three_bits_by_hand():
    """10 values and 2 bits, 1 bit, 10 values and 1 bit, 2 bits and 10 values."""
    values = [7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0b101, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0b110, 4]
    column = words(7 | 1 << 27 | 0b01 << 30, 0b1 | 2 << 1 | 3 << 28 | (0b0 << 31), 0b11 | 4 << 2)
    tensors = {
        "qweight": column.reshape(3, 1),
        "qzeros": words(4).reshape(1, 1),
        "scales": torch.ones(1, 1, dtype=torch.float16),
    }
    weight = from_gptq(tensors, 3, -1, 32, 1, v1=False)
    assert unpack(weight.qweight, 3, 32).tolist() == [values + [0] * 9]
    assert weight.qzeros.numel() == 0  # 4 is the middle of 3 bits
    assert torch.equal(to_gptq(weight, 3, -1, 32)["qweight"], tensors["qweight"])


def test_a_zero_point_of_zero_in_v1_borrows_from_the_next():
    """GPTQModel subtracts 0x11111111 from words: 0x50 becomes 0x3f; adding gives it back."""
    tensors = {
        "qweight": torch.zeros(1, 2, dtype=torch.int32),
        "qzeros": (words(0x50) - 0x11).reshape(1, 1),
        "scales": torch.ones(1, 2),
    }
    assert tensors["qzeros"].item() == 0x3F
    assert from_gptq(tensors, 4, -1, 8, 2, v1=True).qzeros.tolist() == [[0], [5]]


def test_awq_by_hand():
    """The nibbles of a word, from the lowest, are columns 0, 2, 4, 6, 1, 3, 5, 7."""
    tensors = {
        "qweight": words(0x75316420, 0xFFFFFFFF, 0x0000000A).reshape(3, 1),
        "qzeros": words(0x88888888, 0x08888888).reshape(2, 1),
        "scales": torch.arange(1, 17, dtype=torch.float16).view(2, 8),
    }
    weight = from_awq(tensors, 2, 3, 8)
    values = unpack(weight.qweight, 4, 3)
    assert values[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert values[:, 1].tolist() == [15] * 8
    assert values[:, 2].tolist() == [10, 0, 0, 0, 0, 0, 0, 0]
    assert weight.qzeros.tolist() == [[8, 8]] * 7 + [[8, 0]]
    assert weight.scales[3].tolist() == [4, 12]


def test_bitnet_by_hand():
    """The bits of a byte, from the lowest, are of rows 0, 2, 4 and 6 of eight."""
    tensors = {
        "weight": torch.tensor([[0b10_01_00_10], [0b00_00_01_01]], dtype=torch.uint8),
        "weight_scale": torch.tensor([4.0], dtype=torch.bfloat16),
    }
    weight = from_bitnet(tensors, 1, 8)
    values = unpack(weight.qweight, 2, 1).flatten().short() - 2
    assert values.tolist() == [1, 0, -1, 0, 0, -1, 1, -1]
    assert weight.scales.tolist() == [[0.25]] * 8
    assert from_bitnet(tensors, 1, 8, inverse=False).scales.tolist() == [[4.0]] * 8
    assert weight.qzeros.numel() == 0


def test_hqq_by_hand():
    """Two groups to a row of four: of three bits, a word's highest of ten is the first group."""
    word = 7 << 27 | 1 << 24 | 2 << 21 | 6 << 18
    tensors = {
        "W_q": words(word, word + (1 << 18)).reshape(1, 2),
        "scale": torch.tensor([[0.5], [1.0], [2.0], [0.25]]),
        "zero": torch.tensor([[3.5], [0.0], [1.0], [0.5]]),
    }
    weight = from_hqq(tensors, 3, 2, 4, 2)
    assert unpack(weight.qweight, 3, 4).tolist() == [[7, 7, 1, 1], [2, 2, 6, 7]]
    assert weight.scales.tolist() == [[0.5, 1.0], [2.0, 0.25]]
    assert weight.qzeros.tolist() == [[-1.75, 0.0], [-2.0, -0.125]]
    # Bytes of four bits: the high ones are of the first half of the groups.
    tensors["W_q"] = torch.tensor([[0x1F, 0x23], [0xA4, 0x05]], dtype=torch.uint8)
    assert unpack(from_hqq(tensors, 4, 2, 4, 2).qweight, 4, 4).tolist() == [
        [1, 2, 10, 0],
        [15, 3, 4, 5],
    ]


def test_torchao_by_hand():
    """Signed values of two to a byte, the first in its low bits, have another order of scales."""
    packed = torch.tensor([[0x10, -0x08 & 0x7F], [0x7F, 0x35]], dtype=torch.int8)
    tensors = {
        "_weight_qdata": packed,
        "_weight_scale": torch.tensor([[0.5, 1.0], [2.0, 0.25]]),
        "_weight_zero_point": torch.tensor([[3.5, 0.0], [1.0, -0.5]]),
    }
    weight = from_torchao_int4(tensors, 2, 4, 2)
    assert unpack(weight.qweight, 4, 4).tolist() == [[8, 9, 0, 15], [7, 15, 13, 11]]
    assert weight.scales.tolist() == [[0.5, 2.0], [1.0, 0.25]]
    assert weight.qzeros.tolist() == [[-0.5, -15.0], [-8.0, -2.5]]
    tensors = {
        "_weight_qdata": packed,
        "_weight_scale": torch.tensor([[0.5]]),
        "_weight_zero_point": torch.zeros(1, 1, dtype=torch.int8),
    }
    found = from_torchao(tensors, QuantSpec(8, -1, "sym", "w8a8_dynamic"), 2, 2)
    assert found.qweight is packed
    assert found.scales.tolist() == [0.5, 0.5]
    assert found.input_scale is None


def test_pack_quantized_by_hand():
    """-8 … 7 are stored as 0 … 15; zero points run down the columns."""
    tensors = {
        "weight_packed": words(0x76543210, 0xFEDCBA98, 0x8).reshape(1, 3),
        "weight_scale": torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.float16),
        "weight_shape": torch.tensor([1, 17]),
        "weight_zero_point": words(0x8, 0x0, 0xF).reshape(1, 3),
    }
    weight = from_pack_quantized(tensors, 4, 8, 17, 1)
    assert unpack(weight.qweight, 4, 17).tolist() == [[*range(16), 8]]
    assert weight.qzeros.tolist() == [[8, 0, 15]]
    for name, tensor in to_pack_quantized(weight, 4, 8, 17).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


def test_int_quantized_by_hand():
    tensors = {
        "weight": torch.tensor([[-128, 127], [0, -1]], dtype=torch.int8),
        "weight_scale": torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16),
        "input_scale": torch.tensor([0.25]),
    }
    weight = from_int_quantized(tensors, 2, 2, static=True)
    assert weight.qweight.tolist() == [[-128, 127], [0, -1]]
    assert weight.scales.dtype == torch.float16
    assert weight.scales.tolist() == [0.5, 2.0]
    assert weight.input_scale.shape == ()
    assert weight.input_scale.item() == 0.25
    assert from_int_quantized(tensors, 2, 2, static=False).input_scale is None
    packed = from_int_quantized_weight(tensors, 8, -1, 2, 2)
    assert unpack(packed.qweight, 8, 2).tolist() == [[0, 255], [128, 127]]
    assert packed.qzeros.numel() == 0


@pytest.mark.covering(2)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_gptq_is_what_the_decoder_reads(bits, scheme, rows, columns, group_size):
    weight = drawn(rows, columns, bits, group_size, scheme)
    tensors = to_gptq(weight, bits, group_size, columns)
    assert tensors["qweight"].shape == (-(-columns * bits // 32), rows)
    assert tensors["qzeros"].shape == (weight.scales.shape[1], -(-rows * bits // 32))
    expected = float_weight(weight, bits, group_size, columns)
    assert torch.equal(gptq_decoder(tensors, bits, columns, rows, v1=False), expected)
    assert_same(from_gptq(tensors, bits, group_size, columns, rows, v1=False), weight)


@pytest.mark.parametrize("bits", BITS)
def test_gptq_v1_is_what_the_decoder_reads(bits):
    """Zero points of 1 and more, which every writer of v1 agrees on."""
    weight = drawn(40, 64, bits, 16, "asym")
    weight = weight._replace(qzeros=weight.qzeros.clamp(min=1))
    tensors = to_gptq(weight, bits, 16, 64)
    less = pack(weight.qzeros.t() - 1, bits).view(torch.int32)
    tensors["qzeros"] = less[:, : tensors["qzeros"].shape[1]].contiguous()
    expected = float_weight(weight, bits, 16, 64)
    assert torch.equal(gptq_decoder(tensors, bits, 64, 40, v1=True), expected)
    found = from_gptq(tensors, bits, 16, 64, 40, v1=True)
    assert torch.equal(float_weight(found, bits, 16, 64), expected)


@pytest.mark.parametrize("bits", BITS)
def test_every_zero_point_comes_back_from_v1(bits):
    """Subtracting as GPTQModel does: from words where values divide them, else from each value."""
    weight = drawn(64, 32, bits, 8, "asym")
    tensors = to_gptq(weight, bits, 8, 32)
    zeros = tensors["qzeros"].numpy().view(np.uint32)
    if 32 % bits == 0:
        ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
        stored = torch.from_numpy((zeros - ones).view(np.int32))
    else:
        stored = pack((weight.qzeros.t() - 1) & (2**bits - 1), bits).view(torch.int32)
    found = from_gptq(tensors | {"qzeros": stored}, bits, 8, 32, 64, v1=True)
    assert_same(found, weight)


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(8, 64, 16), (5, 45, 7), (33, 37, 32)])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_order_of_channels(bits, scheme, rows, columns, group_size):
    weight = scattered(drawn(rows, columns, bits, group_size, scheme), columns, group_size, bits)
    expected = float_weight(weight, bits, group_size, columns)
    tensors = to_gptq(weight, bits, group_size, columns)
    assert torch.equal(gptq_decoder(tensors, bits, columns, rows, v1=False), expected)
    tensors["g_idx"] = tensors["g_idx"].to(torch.int64 if bits % 2 else torch.int32)
    assert_same(from_gptq(tensors, bits, group_size, columns, rows, v1=False), weight)
    tensors = to_pack_quantized(weight, bits, group_size, columns)
    assert_same(from_pack_quantized(tensors, bits, group_size, columns, rows), weight)


def test_an_order_within_groups_changes_no_weight():
    """An order as GPTQ makes it, by importance, is read back sorted within its groups."""
    perm = torch.from_numpy(np.random.default_rng(0).permutation(48))
    weight = drawn(9, 48, 4, 16, "asym")._replace(perm=perm)
    found = from_gptq(to_gptq(weight, 4, 16, 48), 4, 16, 48, 9, v1=False)
    assert not torch.equal(found.perm, perm)
    assert torch.equal(float_weight(found, 4, 16, 48), float_weight(weight, 4, 16, 48))


def test_one_group_has_no_order():
    weight = drawn(4, 20, 4, -1, "asym")._replace(perm=torch.arange(19, -1, -1))
    tensors = to_gptq(weight, 4, -1, 20)
    assert tensors["g_idx"].tolist() == [0] * 20
    found = from_gptq(tensors, 4, -1, 20, 4, v1=False)
    assert found.perm is None
    assert torch.equal(float_weight(found, 4, -1, 20), float_weight(weight, 4, -1, 20))


@given(st.data())
@examples(150)
def test_both_ways_for_any_shape(data):
    bits, scheme = data.draw(st.sampled_from(BITS)), data.draw(st.sampled_from(SCHEMES))
    rows, columns = data.draw(st.integers(1, 70), "N"), data.draw(st.integers(1, 100), "K")
    group_size = data.draw(st.one_of(st.just(-1), st.integers(1, 110)), "group size")
    weight = drawn(rows, columns, bits, group_size, scheme, data.draw(st.integers(0, 5)))
    if group_size not in (-1, 1) and group_size < columns and data.draw(st.booleans(), "order"):
        weight = scattered(weight, columns, group_size, rows)
        assert not torch.equal(weight.perm, torch.arange(columns)) or columns < 5
    sizes = (bits, group_size, columns)
    for tensors, found in (
        (t := to_gptq(weight, *sizes), from_gptq(t, *sizes, rows, v1=False)),
        (t := to_pack_quantized(weight, *sizes), from_pack_quantized(t, *sizes, rows)),
    ):
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        if weight.perm is not None and torch.equal(weight.perm, torch.arange(columns)):
            weight = weight._replace(perm=None)
        assert_same(found, weight)


def test_whole_blocks_and_dirt_behind_the_last_value():
    """Words that others fill up to 32 values are read, whatever the rest of them holds."""
    weight = drawn(5, 37, 3, 16, "asym")
    tensors = to_gptq(weight, 3, 16, 37)
    assert tensors["qweight"].shape == (4, 5)
    dirty = torch.full((6, 5), -1, dtype=torch.int32)
    dirty[:4] = tensors["qweight"]
    dirty[3] |= -1 << (37 * 3 - 96)
    zeros = torch.full((3, 3), -1, dtype=torch.int32)
    zeros[:, :1] = tensors["qzeros"]
    found = from_gptq(tensors | {"qweight": dirty, "qzeros": zeros}, 3, 16, 37, 5, v1=False)
    assert_same(found, weight)


def test_scales_keep_their_type_and_bfloat16_its_values():
    weight = drawn(4, 32, 4, 8, "sym")
    wide = weight._replace(scales=weight.scales.float() * 1e-9)
    assert_same(from_gptq(to_gptq(wide, 4, 8, 32), 4, 8, 32, 4, v1=False), wide)
    tensors = to_pack_quantized(weight, 4, 8, 32)
    for factor, dtype in ((1.0, torch.float16), (1e30, torch.float32)):
        scales = (weight.scales.float() * factor).bfloat16()
        found = from_pack_quantized(tensors | {"weight_scale": scales}, 4, 8, 32, 4).scales
        assert found.dtype == dtype
        assert torch.equal(found.float(), scales.float())


@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(8, 1, -1), (64, 96, 32), (24, 37, 8), (16, 20, 128)]
)
def test_awq(rows, columns, group_size):
    weight = drawn(rows, columns, 4, group_size, "asym")
    assert_same(from_awq(awq_tensors(weight, columns), group_size, columns, rows), weight)


def test_awq_in_pieces(monkeypatch):
    monkeypatch.setattr("qllm.checkpoint.formats.tensors.CHUNK_VALUES", 500)
    weight = scattered(drawn(16, 131, 4, 32, "asym"), 131, 32, 0)
    plain = weight._replace(perm=None)
    assert_same(from_awq(awq_tensors(plain, 131), 32, 131, 16), plain)
    assert_same(from_gptq(to_gptq(weight, 4, 32, 131), 4, 32, 131, 16, v1=False), weight)


def test_nothing_given_is_changed():
    weight = scattered(drawn(5, 37, 3, 16, "asym"), 37, 16, 0)
    before = [tensor.clone() for tensor in weight]
    for write, read in (
        (to_gptq, lambda t: from_gptq(t, 3, 16, 37, 5, v1=True)),
        (to_pack_quantized, lambda t: from_pack_quantized(t, 3, 16, 37, 5)),
    ):
        tensors = write(weight, 3, 16, 37)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        read(tensors)
        assert all(torch.equal(tensors[name], copies[name]) for name in tensors)
    assert all(torch.equal(a, b) for a, b in zip(weight, before, strict=True))
