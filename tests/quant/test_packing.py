"""Packing: bytes written by hand, GPTQ's own packing, plain Python integers, and both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qllm.quant.packing import BITS, pack, packed_size, unpack

# 1, primes, less than a block of 32, one around it, and several blocks with and without a rest.
COUNTS = (1, 2, 3, 7, 13, 31, 32, 33, 63, 64, 97, 128, 257)


def random_values(rows: int, count: int, bits: int, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint8)
    return torch.from_numpy(drawn)


def stream(row: list[int], bits: int) -> bytes:
    """The definition, in integers of any length: value i takes bits [i·b, (i+1)·b)."""
    number = sum(value << (i * bits) for i, value in enumerate(row))
    return number.to_bytes(-(-len(row) // 32) * 4 * bits, "little")


def gptq_words(values: np.ndarray, bits: int) -> np.ndarray:
    """`qweight` (K·b/32, N) of values (K, N), as IST-DASLab/gptq's QuantLinear.pack makes it."""
    values = values.astype(np.uint32)
    words = np.zeros((values.shape[0] * bits // 32, values.shape[1]), dtype=np.uint32)
    if bits in (2, 4, 8):
        per_word = 32 // bits
        for i, row in enumerate(values):
            words[i // per_word] |= row << np.uint32(bits * (i % per_word))
        return words
    assert bits == 3
    for block in range(values.shape[0] // 32):
        v, w = values[32 * block :], words[3 * block :]
        for j in range(10):
            w[0] |= v[j] << np.uint32(3 * j)
            w[1] |= v[11 + j] << np.uint32(3 * j + 1)
            w[2] |= v[22 + j] << np.uint32(3 * j + 2)
        w[0] |= v[10] << np.uint32(30)
        w[1] |= (v[10] >> np.uint32(2)) & np.uint32(1)
        w[1] |= v[21] << np.uint32(31)
        w[2] |= (v[21] >> np.uint32(1)) & np.uint32(3)
    return words


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], "0d010000"),
        (2, [0, 1, 2, 3, 1], "e4010000 00000000"),
        # 1 + 2·8 + 3·64 + 4·512 + … in octal digits: 0o76543210 = 0xfac688.
        (3, [0, 1, 2, 3, 4, 5, 6, 7], "88c6fa00 00000000 00000000"),
        (4, [1, 2, 3, 4, 15], "21430f00 00000000 00000000 00000000"),
        # 31 | 1 << 5 | 16 << 10: the third value lies in the second byte's high bits.
        (5, [31, 1, 16], "3f400000 00000000 00000000 00000000 00000000"),
        # Four values of 6 bits are three bytes.
        (6, [1, 2, 3, 63], "8130fc00 00000000 00000000 00000000 00000000 00000000"),
        (7, [127, 0, 127], "7fc01f00 00000000 00000000 00000000 00000000 00000000 00000000"),
        (8, [255, 0, 7], "ff000700" + "00000000" * 7),
    ],
)
def test_bytes_written_by_hand(bits, values, expected):
    packed = pack(torch.tensor([values], dtype=torch.uint8), bits)
    assert bytes(packed[0].tolist()).hex() == expected.replace(" ", "")


def test_three_bits_by_hand_across_words():
    # GPTQ: 10 values and 2 bits; 1 bit, 10 values and 1 bit; 2 bits and 10 values. The values
    # 10 = 0b101 and 21 = 0b110 are the two that a word's end cuts.
    values = [0] * 32
    values[9], values[10], values[11], values[20], values[21], values[22], values[31] = (
        7, 0b101, 1, 2, 0b110, 4, 3,
    )  # fmt: skip
    words = [
        7 << 27 | 0b01 << 30,
        0b1 | 1 << 1 | 2 << 28 | 0b0 << 31,
        0b11 | 4 << 2 | 3 << 29,
    ]
    packed = pack(torch.tensor([values], dtype=torch.uint8), 3)
    assert packed.view(torch.int32).numpy().view(np.uint32).tolist() == [words]


def test_every_width_is_covered_by_hand_or_by_stream():
    assert list(BITS) == list(range(1, 9))


@pytest.mark.covering(2)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_both_ways_against_integers(bits, count):
    values = random_values(3, count, bits, seed=count)
    expected = [list(stream(row, bits)) for row in values.tolist()]
    packed = pack(values, bits)
    assert packed.tolist() == expected
    assert packed.shape == (3, packed_size(count, bits))
    assert torch.equal(unpack(torch.tensor(expected, dtype=torch.uint8), bits, count), values)


@given(st.data())
def test_both_ways_for_any_shape(data):
    bits = data.draw(st.sampled_from(BITS), "bits")
    count, rows = data.draw(st.integers(1, 150), "count"), data.draw(st.integers(0, 3), "rows")
    row = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    values = data.draw(st.lists(row, min_size=rows, max_size=rows), "values")
    tensor = torch.tensor(values, dtype=torch.uint8).reshape(rows, count)
    packed = pack(tensor, bits)
    assert packed.tolist() == [list(stream(row, bits)) for row in values]
    assert unpack(packed, bits, count).tolist() == values


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_gptq(bits, blocks):
    values = random_values(7, 32 * blocks, bits)  # (N, K)
    words = pack(values, bits).view(torch.int32).t().numpy().view(np.uint32)
    assert np.array_equal(words, gptq_words(values.numpy().T, bits))


@pytest.mark.parametrize("bits", BITS)
def test_input_that_is_not_contiguous(bits):
    values = random_values(40, 33, bits)
    assert torch.equal(pack(values.t(), bits), pack(values.t().contiguous(), bits))
    packed = pack(values, bits)
    wide = torch.cat([packed, packed], dim=1)[:, : packed.shape[1]]
    assert torch.equal(unpack(wide, bits, 33), values)


@pytest.mark.parametrize(
    ("count", "bits", "expected"),
    [(1, 1, 4), (32, 1, 4), (33, 1, 8), (32, 3, 12), (1, 3, 12), (4096, 4, 2048), (33, 8, 64)],
)
def test_packed_size(count, bits, expected):
    assert packed_size(count, bits) == expected


@pytest.mark.parametrize("bits", [bits for bits in BITS if bits < 8])
def test_a_value_that_does_not_fit_is_refused(bits):
    values = torch.tensor([[0, 2**bits]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"value {2**bits} does not fit in {bits} bits"):
        pack(values, bits)


@pytest.mark.parametrize("bits", [0, 9, 16, -1])
def test_other_widths_are_refused(bits):
    matrix = torch.zeros(1, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="choose 1 to 8"):
        pack(matrix, bits)
    with pytest.raises(ValueError, match="choose 1 to 8"):
        unpack(matrix, bits, 32)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(32, dtype=torch.uint8), torch.zeros(1, 32), torch.zeros(1, 32).int()]
)
def test_other_tensors_are_refused(tensor):
    with pytest.raises(ValueError, match="uint8 matrix"):
        pack(tensor, 4)
    with pytest.raises(ValueError, match="uint8 matrix"):
        unpack(tensor, 4, 32)


@pytest.mark.parametrize(("stored", "count"), [(16, 33), (32, 32), (15, 32), (0, 1)])
def test_a_wrong_number_of_bytes_is_refused(stored, count):
    with pytest.raises(ValueError, match=f"{stored} bytes do not hold {count} values of 4 bits"):
        unpack(torch.zeros(2, stored, dtype=torch.uint8), 4, count)
