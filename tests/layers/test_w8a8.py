"""Layers of int8 weights and activations: values against numpy, and the range of static inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_cases import RANGE, W8A8_SPECS, make, normal, processed, spec_id

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.layers import linear_class

pytestmark = pytest.mark.usefixtures("one_thread")

NUMPY_DTYPES = (torch.float32, torch.float16)  # those that numpy has


def int8_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 per output channel, by DESIGN §3: integers and float16 scales."""
    weight = weight.astype(np.float32)
    scales = (np.abs(weight).max(axis=1) * np.float32(2) / np.float32(255)).astype(np.float16)
    steps = np.rint(weight / scales.astype(np.float32)[:, None])
    return np.clip(steps, -128, 127).astype(np.int64), scales


def int8_input(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x.astype(np.float32) / scales), -128, 127).astype(np.int64)


@pytest.mark.parametrize("columns", [2, 67, 2048])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("spec", W8A8_SPECS, ids=spec_id)
def test_w8a8_is_numpy_s_integer_arithmetic(spec, dtype, bias, columns):
    layer, weight, b = make(spec, 24, columns, dtype=dtype, bias=bias)
    x = normal(5, columns, seed=2, dtype=dtype) * 3  # some lie outside the static range
    x[3] = 0
    values = x.numpy().astype(np.float32)
    if spec.kind == "w8a8_static":
        x_scales = np.float32(RANGE * 2 / 255)
    else:
        x_scales = np.abs(values).max(axis=1, keepdims=True) * np.float32(2) / np.float32(255)
        x_scales[3] = 1
    q_weight, scales = int8_weight(weight.numpy())
    assert np.array_equal(layer.qweight.numpy(), q_weight)
    assert np.array_equal(layer.scales.numpy(), scales)
    total = int8_input(values, x_scales) @ q_weight.T
    expected = total.astype(np.float32) * x_scales * scales.astype(np.float32)
    expected = expected + b.numpy().astype(np.float32) if bias else expected
    got = processed(layer)(x)
    assert got.dtype == dtype
    assert np.array_equal(got.numpy(), expected.astype(got.numpy().dtype))
    back = q_weight * scales.astype(np.float64)[:, None]
    assert np.array_equal(layer.dequantize().double().numpy(), back)


@pytest.mark.parametrize("spec", W8A8_SPECS, ids=spec_id)
def test_w8a8_weights_by_hand(spec):
    # Scales 1 and 2: ±127.5 and ±255 are the ends, 127 is as far as int8 goes up.
    weight = torch.tensor([[127.5, -127.5, 0.0, 3.0], [255.0, -255.0, 1.0, 10.0]])
    layer = linear_class(spec).from_float(weight, None, spec, input_range=127.5)
    assert layer.qweight.dtype == torch.int8
    assert layer.qweight.tolist() == [[127, -128, 0, 3], [127, -128, 0, 5]]
    assert layer.scales.tolist() == [1.0, 2.0]
    x = torch.tensor([[127.5, -1.0, 2.0, 0.0]])  # with scale 1: 127, -1, 2, 0
    assert processed(layer)(x).tolist() == [[127.0 * 127 + 128, 2 * (127.0 * 127 + 128)]]


def test_rows_do_not_see_each_other():
    layer = processed(make(QuantSpec.parse("8:tc-li"))[0])
    x = normal(6, 67, seed=2)
    x[0] *= 1000
    alone = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x), alone)


@pytest.mark.parametrize("spec", W8A8_SPECS, ids=spec_id)
@pytest.mark.parametrize("size", [1e8, 1e-6])
def test_w8a8_scales_that_float16_cannot_hold(size, spec):
    weight = normal(4, 8) * size
    layer = linear_class(spec).from_float(weight, None, spec, input_range=RANGE)
    assert layer.scales.dtype == torch.float32
    assert (layer.dequantize() - weight).abs().max() <= weight.abs().max() / 255 * 1.001


@pytest.mark.parametrize("input_range", [0.0, 1e-45])
def test_a_static_range_of_nothing(input_range):
    # A layer whose inputs were all zero (or all but): scale 1, so that other inputs give numbers.
    spec = QuantSpec.parse("8:tc")
    layer = linear_class(spec).from_float(torch.ones(2, 3), None, spec, input_range=input_range)
    assert layer.input_scale.item() == 1.0 and layer.input_scale.dtype == torch.float32
    expected = 6 * layer.dequantize()[0, 0].item()
    assert processed(layer)(torch.full((1, 3), 2.0)).tolist() == [[expected] * 2]


def test_static_scale_is_float32_whatever_the_default_type():
    spec = QuantSpec.parse("8:tc")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = linear_class(spec).from_float(torch.ones(2, 3), None, spec, input_range=3.7)
    finally:
        torch.set_default_dtype(before)
    assert layer.input_scale.dtype == torch.float32
    assert layer.input_scale.item() == np.float32(3.7 * 2 / 255)


def test_static_needs_a_calibration():
    spec = QuantSpec.parse("8:tc")
    with pytest.raises(UserError, match=r"fake_calib_gen\.py, or use 8:tc-li"):
        linear_class(spec).from_float(torch.ones(2, 3), None, spec, input_range=None)


def test_8_and_8_tc_li_differ():
    plain, integer = QuantSpec.parse("8"), QuantSpec.parse("8:tc-li")
    assert plain != integer and linear_class(plain) is not linear_class(integer)
    x = normal(4, 256, seed=2)
    x[:, 0] = 60  # an outlier, which costs the int8 activations their steps
    layers = [processed(make(spec, 24, 256)[0]) for spec in (plain, integer)]
    exact = [x @ layer.dequantize().t() + layer.bias for layer in layers]
    errors = [(layer(x) - y).abs().max().item() for layer, y in zip(layers, exact, strict=True)]
    assert errors[0] < 1e-4
    assert errors[1] > 1e-2
