"""The specification itself, against numpy: float64 where it rounds, integers where it must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qllm.ops import KERNELS, Request, reference
from qllm.quant.packing import BITS, pack

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def integers(shape: tuple[int, ...], low: int, high: int, seed: int = 0) -> np.ndarray:
    """Whole numbers from low to high, both included."""
    return np.random.default_rng(seed).integers(low, high + 1, shape)


def int8(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(integers(shape, -128, 127, seed).astype(np.int8))


def quantized(rows: int, columns: int, bits: int, group_size: int, scheme: str, scales_dtype):
    """Packed integers with scales and zeros, and the float64 matrix they stand for."""
    groups = 1 if group_size == -1 else -(-columns // group_size)
    step = columns if group_size == -1 else group_size
    q = integers((rows, columns), 0, 2**bits - 1, seed=bits)
    zeros = integers((rows, groups), 0, 2**bits - 1, seed=columns)
    drawn = np.random.default_rng(rows).uniform(0.001, 0.1, (rows, groups))
    scales = torch.from_numpy(drawn).to(scales_dtype)
    index = np.arange(columns) // step
    zero = zeros[:, index] if scheme == "asym" else 2 ** (bits - 1)
    matrix = (q - zero) * scales.double().numpy()[:, index]
    packed = pack(torch.from_numpy(q.astype(np.uint8)), bits)
    qzeros = torch.from_numpy(zeros.astype(np.uint8))
    return packed, scales, qzeros if scheme == "asym" else qzeros.new_empty(0), matrix


@pytest.mark.covering(2)
@pytest.mark.parametrize("scheme", ["sym", "asym"])
@pytest.mark.parametrize("group_size", [-1, 1, 7, 32, 128, 10**12])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize(bits, group_size, scheme):
    # 10^12: a group that is longer than the row costs no more than the row.
    for columns in (64, 67):
        packed, scales, qzeros, matrix = quantized(5, columns, bits, group_size, scheme, torch.half)
        # An integer of 8 bits times a float16 scale is exact in float32.
        got = reference.dequantize(packed, scales, qzeros, bits, group_size, columns, torch.float32)
        assert got.dtype == torch.float32 and got.shape == (5, columns)
        assert np.array_equal(got.double().numpy(), matrix)


@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once(dtype, scales_dtype):
    packed, scales, qzeros, matrix = quantized(9, 67, 8, 16, "asym", scales_dtype)
    # float32 scales: the float32 product, then the type; both are one rounding of what they take.
    exact = torch.from_numpy(matrix)
    expected = (exact.float() if scales_dtype == torch.float32 else exact).to(dtype)
    got = reference.dequantize(packed, scales, qzeros, 8, 16, 67, dtype)
    assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.covering(2)
@pytest.mark.parametrize(
    "chunk", [reference.linear.CHUNK_WEIGHTS, 140]
)  # whole, or two rows at a time
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["sym", "asym"])
@pytest.mark.parametrize("group_size", [-1, 7, 32])
@pytest.mark.parametrize("bits", BITS)
def test_weight_only_linear(bits, group_size, scheme, bias, chunk, monkeypatch):
    monkeypatch.setattr(reference.linear, "CHUNK_WEIGHTS", chunk)
    packed, scales, qzeros, matrix = quantized(5, 67, bits, group_size, scheme, torch.half)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 67)).astype(np.float32))
    b = torch.arange(5.0) if bias else None
    got = reference.weight_only_linear(x, packed, scales, qzeros, b, 5, bits, group_size)
    expected = x.double().numpy() @ matrix.T + (np.arange(5.0) if bias else 0)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-4 * abs(matrix).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_linear(dtype, bias):
    # Small integers: every type has the exact answer.
    x, weight = integers((3, 5), -4, 4), integers((2, 5), -4, 4, seed=1)
    b = torch.tensor([3.0, -5.0], dtype=dtype) if bias else None
    got = reference.dense_linear(torch.from_numpy(x).to(dtype), torch.tensor(weight).to(dtype), b)
    expected = x @ weight.T + (np.array([3, -5]) if bias else 0)
    assert got.dtype == dtype and got.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_per_token_by_hand(dtype):
    # The largest of a row stands at 127.5 steps: -255 at -127.5, which rounds to the even -128,
    # 255 at 127.5, which is cut off at 127.
    x = torch.tensor([[-255.0, 2.0, 3.0], [255.0, 1.0, 5.0], [0.0, 0.0, 0.0]], dtype=dtype)
    x = torch.where(x.abs() == 255, x.sign() * 254, x) if dtype == torch.bfloat16 else x
    q, scales = reference.quantize_per_token(x)
    assert q.dtype == torch.int8 and scales.dtype == torch.float32
    if dtype == torch.bfloat16:
        assert scales.tolist() == [[np.float32(508) / np.float32(255)]] * 2 + [[1.0]]
        assert q.tolist() == [[-128, 1, 2], [127, 1, 3], [0, 0, 0]]
    else:
        assert scales.tolist() == [[2.0], [2.0], [1.0]]
        assert q.tolist() == [[-128, 1, 2], [127, 0, 2], [0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_per_token(dtype):
    x = torch.randn(13, 67, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[4] = 0
    q, scales = reference.quantize_per_token(x)
    values = x.float().numpy()
    expected = np.abs(values).max(axis=1, keepdims=True) * np.float32(2) / np.float32(255)
    expected[4] = 1
    assert np.array_equal(scales.numpy(), expected)
    steps = np.clip(np.rint(values / expected), -128, 127)
    assert np.array_equal(q.numpy(), steps)


def test_quantize_int8_cuts_off():
    x = torch.tensor([[1e9, -1e9, 127.6, -128.4, 0.5, 1.5, -0.5]])
    q = reference.quantize_int8(x, torch.tensor(1.0))
    assert q.tolist() == [[127, -128, 127, -128, 0, 2, 0]]


def int8_ops(columns: int) -> list:
    """The reference, and torch's kernel where this machine has an exact one."""
    request = Request(columns, 8, 8, -1, "sym", "cpu")
    (torchs,) = (kernel for kernel in KERNELS["int8_linear"] if kernel.name == "torch._int_mm")
    return [
        reference.int8_matmul,
        *([] if torchs.unsupported_reason(request) else [reference.int_mm]),
    ]


@pytest.mark.parametrize(
    "columns", [1, 31, 1023, 1024, 1025, 2048, 57344, (1 << 17) - 1, (1 << 17) + 2]
)
@pytest.mark.parametrize(("a", "b"), [(-128, -128), (-128, 127), (127, 127)])
def test_int8_matmul_at_the_extremes(a, b, columns):
    # 57344: the longest sum of BLOOM-176b. Those of the last need not fit in int32. An odd count of
    # 1s makes the sum an odd number.
    x = torch.full((2, columns), a, dtype=torch.int8)
    weight = torch.full((3, columns), b, dtype=torch.int8)
    x[:, 0], weight[:, 0] = 1, 1
    expected = a * b * (columns - 1) + 1
    for op in int8_ops(columns):
        got = op(x, weight)
        assert got.dtype == (torch.int32 if columns < 1 << 17 else torch.int64)
        assert got.tolist() == [[expected] * 3] * 2


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    outputs=st.integers(1, 9),
    seed=st.integers(0),
)
def test_int8_matmul_at_any_shape(rows, columns, outputs, seed):
    x, weight = int8((rows, columns), seed), int8((outputs, columns), seed + 1)
    expected = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    for op in int8_ops(columns):
        assert np.array_equal(op(x, weight).numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 4096, 64), (17, 1025, 3), (33, 2049, 129)])
def test_int8_matmul_beyond_one_exact_float32_sum(shape):
    rows, columns, outputs = shape
    x, weight = int8((rows, columns)), int8((outputs, columns), seed=1)
    expected = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    for op in int8_ops(columns):
        assert np.array_equal(op(x, weight).numpy(), expected)


@pytest.mark.parametrize("stride", [0, 1, 5, 64, 100])
def test_int8_matmul_of_a_row_with_any_stride(stride):
    # A single row's stride means nothing, and slicing and transposing leave odd ones behind.
    x = torch.as_strided(int8((200,)), (1, 64), (stride, 1))
    weight = int8((5, 64), seed=1)
    expected = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    for op in int8_ops(64):
        assert np.array_equal(op(x, weight).numpy(), expected)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_int32(dtype, bias, per_token):
    total = integers((4, 6), -(10**8), 10**8)
    random = np.random.default_rng(1)
    x_scales = random.uniform(1e-4, 1e-3, (4, 1) if per_token else ()).astype(np.float32)
    scales = random.uniform(1e-4, 1e-3, 6).astype(np.float16)
    b = random.standard_normal(6).astype(np.float16)
    got = reference.scale_int32(
        torch.from_numpy(total.astype(np.int32)),
        torch.tensor(x_scales),
        torch.from_numpy(scales),
        torch.from_numpy(b) if bias else None,
        dtype,
    )
    expected = total.astype(np.float32) * x_scales * scales.astype(np.float32)
    expected = expected + b.astype(np.float32) if bias else expected
    assert got.dtype == dtype
    assert np.array_equal(got.numpy(), expected.astype(got.numpy().dtype))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 67, 13), (9, 2049, 40)])
def test_int8_linear(shape, dtype, bias, static):
    rows, columns, outputs = shape
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((rows, columns))).to(dtype)
    x[rows // 2] *= 100  # outside of the static range
    weight = int8((outputs, columns), seed=1)
    scales = torch.from_numpy(random.uniform(0.001, 0.01, outputs)).half()
    b = torch.from_numpy(random.standard_normal(outputs)).to(dtype) if bias else None
    values = x.float().numpy()
    steps = np.abs(values).max(axis=1, keepdims=True) * np.float32(2) / np.float32(255)
    steps = np.float32(0.02) if static else steps
    q = np.clip(np.rint(values / steps), -128, 127).astype(np.int64)
    expected = (q @ weight.numpy().astype(np.int64).T).astype(np.float32)
    expected = torch.from_numpy(expected * steps * scales.float().numpy())
    expected = (expected + b.float() if bias else expected).to(dtype)
    ops = [reference.int8_linear]
    if reference.int_mm in int8_ops(columns):
        ops.append(reference.int8_linear_by_int_mm)
    for op in ops:
        got = op(x, weight, scales, b, torch.tensor(steps) if static else None, outputs)
        assert got.dtype == dtype and torch.equal(got, expected)


def softmax_attention(q, keys, values, mask, causal):
    """Row by row and head by head, float64."""
    batch, heads, length, dim = q.shape
    share = heads // keys.shape[1]
    out = np.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            scores = q[b, h] @ keys[b, h // share].T / np.sqrt(dim)
            if mask is not None:
                full = np.broadcast_to(mask, (batch, heads, length, keys.shape[2]))
                scores = scores + full[b, h]
            if causal:
                scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, h] = weights / weights.sum(axis=1, keepdims=True) @ values[b, h // share]
    return out


@pytest.mark.parametrize("mask_heads", [None, 1, "all"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize(("length", "span"), [(1, 1), (1, 9), (5, 5), (3, 7)])
def test_attention(length, span, kv_heads, mask_heads):
    random = np.random.default_rng(0)
    q = random.standard_normal((2, 6, length, 8))
    keys, values = random.standard_normal((2, 2, kv_heads, span, 8))
    mask = None
    if mask_heads is not None:
        mask = random.standard_normal((2, 6 if mask_heads == "all" else 1, length, span))
        mask[1, :, :, span // 2 + 1 :] = -np.inf  # a shorter row
    tensors = (torch.from_numpy(t) for t in (q, keys, values))
    got = reference.softmax_attention(
        *tensors, None if mask is None else torch.from_numpy(mask), False
    )
    expected = softmax_attention(q, keys, values, mask, causal=False)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_causal_attention(length, kv_heads):
    random = np.random.default_rng(0)
    q = random.standard_normal((1, 4, length, 8))
    keys, values = random.standard_normal((2, 1, kv_heads, length, 8))
    got = reference.softmax_attention(*(torch.from_numpy(t) for t in (q, keys, values)), None, True)
    expected = softmax_attention(q, keys, values, None, causal=True)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)
