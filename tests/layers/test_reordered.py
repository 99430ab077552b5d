"""The layer whose groups are not runs of input channels, against the dense one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from layer_cases import normal

from qllm.config import SCHEMES, QuantSpec
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import ReorderedLinear, WeightOnlyLinear
from qllm.quant.algorithm import GPTQOptions
from qllm.quant.gptq import quantize_gptq
from qllm.quant.packing import BITS, PackedWeight
from qllm.quant.rtn import fake_quantize, quantize_rtn

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 24, 67


def made(bits: int, group_size: int, scheme: str, *, bias: bool = True):
    """A layer, and the matrix (N, K) it stands for: groups of a shuffled weight, shuffled back."""
    spec = QuantSpec.parse(bits, group_size, scheme)
    perm = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(bits))
    shuffled = normal(ROWS, COLUMNS, seed=bits) * 0.05
    packed = quantize_rtn(shuffled, bits, group_size, scheme)._replace(perm=perm)
    matrix = np.empty((ROWS, COLUMNS), np.float32)
    matrix[:, perm.numpy()] = fake_quantize(shuffled, bits, group_size, scheme).numpy()
    b = normal(ROWS, seed=9) if bias else None
    return WeightOnlyLinear.from_packed(packed, b, spec, COLUMNS), torch.from_numpy(matrix)


@pytest.mark.covering(2)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [1, 16, 20])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_dense_layer_of_its_matrix(bits, group_size, scheme, bias):
    layer, matrix = made(bits, group_size, scheme, bias=bias)
    assert isinstance(layer, ReorderedLinear)
    assert torch.equal(layer.dequantize(), matrix)
    dense = DenseLinear(matrix, layer.bias, QuantSpec())
    x = normal(5, COLUMNS, seed=2)
    before = x.clone()
    layer.process_weights_after_loading()
    got = layer(x)
    assert got.shape == (5, ROWS)
    assert torch.allclose(got, dense(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [slice(0, 5), slice(7, 8), slice(20, None), slice(None)])
def test_some_rows(rows):
    layer, matrix = made(3, 16, "asym")
    assert torch.equal(layer.dequantize(rows), matrix[rows])


def test_without_an_order_it_is_the_plain_layer():
    packed = quantize_rtn(normal(ROWS, COLUMNS), 4, 16, "asym")
    layer = WeightOnlyLinear.from_packed(packed, None, QuantSpec.parse(4, 16), COLUMNS)
    assert type(layer) is WeightOnlyLinear
    assert layer.packed.perm is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_gives_back_what_it_is_made_of(scheme):
    layer, _ = made(4, 16, scheme)
    again = WeightOnlyLinear.from_packed(layer.packed, layer.bias, layer.spec, COLUMNS)
    for got, expected in zip(again.packed, layer.packed, strict=True):
        assert torch.equal(got, expected)
    assert isinstance(layer.packed, PackedWeight)
    assert dict(layer.named_buffers()).keys() == {"qweight", "scales", "qzeros", "bias", "perm"}
    assert layer.nbytes() == sum(t.nbytes for t in (*layer.packed, layer.bias))
    assert layer.packed.perm.dtype == torch.int64


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_a_kernel_changes_nothing_of_it(bits, scheme):
    layer, matrix = made(bits, 16, scheme)
    before = [tensor.clone() for tensor in layer.packed]
    x = normal(5, COLUMNS, seed=2)
    layer.process_weights_after_loading()
    first = layer(x)
    assert layer.layout is layer.choice.kernel.layout
    assert torch.equal(layer(x), first)
    for got, expected in zip(layer.packed, before, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert torch.equal(layer.dequantize(), matrix)
    assert torch.equal(layer.dequantize(slice(5, 9)), matrix[5:9])
    again = WeightOnlyLinear.from_packed(layer.packed, layer.bias, layer.spec, COLUMNS)
    again.process_weights_after_loading()
    assert torch.equal(again(x), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_activations(dtype):
    layer, matrix = made(4, 16, "asym", bias=False)
    x = normal(5, COLUMNS, seed=2).to(dtype)
    layer.process_weights_after_loading()
    got = layer(x)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), x.float() @ matrix.t(), rtol=0.02, atol=0.02)


def test_what_gptq_finds_runs():
    """The product of a layer and its inputs, for every kind of order."""
    weight, x = normal(ROWS, COLUMNS) * 0.05, normal(200, COLUMNS, seed=1)
    x *= torch.linspace(0.1, 3, COLUMNS)
    for act_order, static_groups in itertools.product((False, True), repeat=2):
        options = GPTQOptions(act_order=act_order, static_groups=static_groups)
        packed, _ = quantize_gptq(weight, x.t() @ x, 8, 16, "asym", options)
        layer = WeightOnlyLinear.from_packed(packed, None, QuantSpec.parse(8, 16), COLUMNS)
        assert isinstance(layer, ReorderedLinear) == (act_order and not static_groups)
        y = x @ weight.t()
        layer.process_weights_after_loading()
        assert (layer(x) - y).square().mean() < 1e-4 * y.square().mean()
