"""The kernels' layout of a weight: both ways on every path, and as `kernels.h` describes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_paths import (
    DTYPES,
    STORED_SCHEMES,
    Weight,
    everywhere,
    kernel,
    random_weight,
    weight_of,
)
from hypothesis import given
from hypothesis import strategies as st

from qllm.ops import reference
from qllm.quant.packing import BITS, PackedWeight, unpack

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = (-1, 16, 20, 32, 100, 128)
# (N, K): one, primes, full panels and K blocks, less than a vector, long rows.
SHAPES = ((1, 1), (2, 3), (17, 31), (16, 128), (13, 67), (33, 1000), (5, 257))


def described(q: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Integers (N, K) as `kernels.h` describes them, one plane after the other."""
    outputs, inputs = q.shape
    together = 32 if group == 16 else group
    starts = [
        (start, min(start + 32, first + together, inputs))
        for first in range(0, inputs, together)
        for start in range(first, min(first + together, inputs), 32)
    ]
    filled = np.zeros((-(-outputs // 16) * 16, len(starts), 32), np.uint8)
    for k_block, (start, end) in enumerate(starts):
        filled[:outputs, k_block, : end - start] = q[:, start:end]
    steps = filled.reshape(-1, 16, len(starts), 8, 4).transpose(0, 2, 3, 1, 4)
    steps = steps.reshape(-1, len(starts), 8, 64)  # byte 4 lane + i of a step
    vectors, begin = [], 0
    for plane in (8, 4, 2, 1):
        if bits & plane:
            values, share = steps >> begin & 2**plane - 1, 8 // plane
            for v in range(plane):
                of_vector = values[:, :, v * share : (v + 1) * share]
                shifts = plane * np.arange(share, dtype=np.uint8)[:, None]
                vectors.append(np.bitwise_or.reduce(of_vector << shifts, axis=2))
            begin += plane
    return np.stack(vectors, axis=2).astype(np.uint8)


def filled_up(values: torch.Tensor) -> torch.Tensor:
    """(N, G) to (panels, G, 16), zeros behind the last channel."""
    panels = -(-len(values) // 16)
    more = values.new_zeros(panels * 16, values.shape[1])
    more[: len(values)] = values
    return more.unflatten(0, (panels, 16)).transpose(1, 2)


def packed_everywhere(weight: Weight) -> PackedWeight:
    layout = kernel("weight_only_linear").layout
    return PackedWeight(
        *(everywhere(lambda i=i: layout.pack(weight.stored, weight.request)[i]) for i in range(3))
    )


def assert_layout(weight: Weight) -> None:
    """As described, and the way back."""
    request, stored = weight.request, weight.stored
    packed = packed_everywhere(weight)
    q = unpack(stored.qweight, request.bits, request.in_features).numpy()
    columns = request.in_features
    group = columns if request.group_size == -1 else min(request.group_size, columns)
    assert np.array_equal(packed.qweight.numpy(), described(q, request.bits, group))
    assert packed.scales.dtype == stored.scales.dtype
    assert torch.equal(packed.scales, filled_up(stored.scales))
    if stored.qzeros.numel():
        assert torch.equal(packed.qzeros, filled_up(stored.qzeros))
    else:
        assert packed.qzeros.numel() == 0
    layout = kernel("weight_only_linear").layout
    for got, expected in zip(
        (everywhere(lambda i=i: layout.unpack(packed, request)[i]) for i in range(3)),
        stored[:3],
        strict=True,
    ):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert layout.unpack(packed, request).perm is None
    index = torch.arange(3 * request.out_features) * 7 % request.out_features
    shape = (request.bits, request.group_size, request.in_features)
    for dtype in DTYPES:
        want = reference.packed_embedding(index, stored, *shape, dtype)
        got = everywhere(lambda dtype=dtype: layout.look_up(index, packed, request, dtype))
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.covering(1)
@pytest.mark.parametrize("scheme", STORED_SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_there_and_back(bits, scheme):
    first = bits + STORED_SCHEMES.index(scheme)
    for group, group_size in enumerate(GROUPS):
        # Schemes share the groups of a shape at each number of bits: two of them have one half.
        for i in range((first + group) % 2, len(SHAPES), 2):
            scales_dtype = (torch.float16, torch.float32)[(i + group) // 2 % 2]
            assert_layout(random_weight(SHAPES[i], bits, group_size, scheme, scales_dtype))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    bits=st.sampled_from(BITS),
    group_size=st.one_of(st.just(-1), st.integers(1, 310)),
    scheme=st.sampled_from(STORED_SCHEMES),
    scales_dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0),
)
def test_any_shape_there_and_back(shape, bits, group_size, scheme, scales_dtype, seed):
    assert_layout(random_weight(shape, bits, group_size, scheme, scales_dtype, seed))


def test_bytes_by_hand():
    # 3 bits are a plane of the low two, 2 vectors long, and one of the third.
    q = np.array([[1, 2, 3, 4, 5], [7, 0, 6, 0, 1]])
    scales = torch.tensor([[0.5, 1.0], [2.0, 4.0]], dtype=torch.float16)
    zeros = np.array([[1, 2], [3, 4]])
    packed = packed_everywhere(weight_of(q, zeros, scales, 3, 4))
    # Two groups, of inputs 0 to 3 and of input 4, are a K block each.
    assert packed.qweight.shape == (1, 2, 3, 64)
    expected = np.zeros((1, 2, 3, 64), np.uint8)
    expected[0, 0, 0, :8] = [1, 2, 3, 0, 3, 0, 2, 0]  # low bits of step 0: 4 bytes to a lane
    expected[0, 0, 2, :8] = [0, 0, 0, 1, 1, 0, 1, 0]  # their third bits
    expected[0, 1, 0, [0, 4]] = [1, 1]
    expected[0, 1, 2, [0, 4]] = [1, 0]
    assert np.array_equal(packed.qweight.numpy(), expected)
    assert packed.scales[0].tolist() == [[0.5, 2.0, *[0.0] * 14], [1.0, 4.0, *[0.0] * 14]]
    assert packed.qzeros[0].tolist() == [[1, 3, *[0] * 14], [2, 4, *[0] * 14]]
    # One group: input 4 is of step 1, whose two low bits are the next two, and third the next bit.
    packed = packed_everywhere(weight_of(q, zeros[:, :1], scales[:, :1], 3, -1))
    expected = np.zeros((1, 1, 3, 64), np.uint8)
    expected[0, 0, 0, :8] = [1 | 1 << 2, 2, 3, 0, 3 | 1 << 2, 0, 2, 0]
    expected[0, 0, 2, :8] = [0 | 1 << 1, 0, 0, 1, 1 | 0 << 1, 0, 1, 0]
    assert np.array_equal(packed.qweight.numpy(), expected)


def test_seven_bits_by_hand():
    # Planes of 4, 2 and 1 bits: 0b1_01_1010 in the last input that the last lane of a K block has.
    q = np.zeros((16, 32), np.int64)
    q[15, 31] = 0b1011010
    packed = packed_everywhere(weight_of(q, None, torch.ones(16, 1), 7, -1))
    expected = np.zeros((7, 64), np.uint8)
    expected[3, 63] = 0b1010 << 4  # step 7 is the second of the fourth vector of 4 bits
    expected[5, 63] = 0b01 << 6  # the fourth of the second vector of 2 bits
    expected[6, 63] = 1 << 7
    assert np.array_equal(packed.qweight[0, 0].numpy(), expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_work(threads):
    weight = random_weight((100, 67), 5, 20)
    expected = weight.packed
    torch.set_num_threads(threads)
    layout = kernel("weight_only_linear").layout
    for got, alone in zip(layout.pack(weight.stored, weight.request), expected, strict=True):
        assert got is alone or torch.equal(got, alone)
    for got, stored in zip(layout.unpack(expected, weight.request), weight.stored, strict=True):
        assert got is stored or torch.equal(got, stored)


@pytest.mark.parametrize("shape", [(1, 100), (37, 100), (2, 1)])
def test_any_strides(shape):
    # A checkpoint's tensors come transposed, cut out of others, or as a row with any stride.
    weight = random_weight(shape, 4, 32)
    layout = kernel("weight_only_linear").layout
    transposed = PackedWeight(*(t.t().contiguous().t() for t in weight.stored[:3]))
    wide = PackedWeight(*(torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in weight.stored[:3]))
    row = PackedWeight(*(t.as_strided(t.shape, (1, 1)) for t in weight.stored[:3]))
    for stored in (transposed, wide, *([row] if shape[0] == 1 else [])):
        packed = layout.pack(stored, weight.request)
        for got, expected in zip(packed[:3], weight.packed[:3], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("wrong", [-1, 33, -(2**63), 2**40])
def test_a_row_outside_the_table_is_an_error(wrong):
    weight = random_weight((33, 64), 4, 32, "asym", torch.float16)
    layout = kernel("weight_only_linear").layout
    packed = layout.pack(weight.stored, weight.request)
    with pytest.raises(IndexError, match="an index is outside its table"):
        layout.look_up(torch.tensor([0, wrong]), packed, weight.request, torch.float32)
