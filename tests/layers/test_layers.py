"""The layer contract for every bitwidth: values against numpy, bytes, and the meta device."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from layer_cases import RANGE, SPECS, W8A8_SPECS, make, normal, processed, spec_id

from qllm import ops
from qllm.config import SCHEMES, QuantSpec
from qllm.layers import LAYERS, linear_class
from qllm.layers.base import describe
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.quant.packing import unpack

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT_ONLY = [spec for spec in SPECS if spec.kind == "weight_only"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_every_row_of_the_table_has_a_bitwidth():
    assert {spec.kind for spec in SPECS} == set(LAYERS)
    assert all(linear_class(spec) is LAYERS[spec.kind] for spec in SPECS)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_empty_is_the_layer_without_memory(spec, dtype):
    for rows, columns, bias in ((24, 67, True), (5, 128, False), (1, 2, True)):
        layer, _, _ = make(spec, rows, columns, dtype=dtype, bias=bias)
        empty = linear_class(spec).empty(columns, rows, bias, spec, dtype)
        real, meta = dict(layer.named_buffers()), dict(empty.named_buffers())
        assert {name: (t.shape, t.dtype) for name, t in meta.items()} == {
            name: (t.shape, t.dtype) for name, t in real.items()
        }
        assert all(tensor.is_meta for tensor in meta.values())
        assert empty.nbytes() == layer.nbytes()
        there = processed(copy.deepcopy(layer)).nbytes()  # in the kernel's layout, if it has one
        assert empty.nbytes_on("cpu") == layer.nbytes_on("cpu") == there
        assert not list(layer.parameters())
        assert (empty.in_features, empty.out_features) == (columns, rows)
        assert (layer.in_features, layer.out_features) == (columns, rows)


@pytest.mark.covering(1)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_an_empty_layer_takes_the_tensors_strictly(spec, bias):
    layer, _, _ = make(spec, bias=bias)
    loaded = linear_class(spec).empty(67, 24, bias, spec, torch.float32)
    loaded.load_state_dict(layer.state_dict(), strict=True, assign=True)
    x = normal(3, 67, seed=2)
    assert torch.equal(processed(loaded)(x), processed(layer)(x))
    assert torch.equal(loaded.dequantize(), layer.dequantize())


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_forward_is_the_product_with_dequantize(spec, dtype):
    layer, _, bias = make(spec, dtype=dtype)
    x = normal(4, 67, seed=2, dtype=dtype).clamp(-RANGE, RANGE)
    got = processed(layer)(x)
    assert got.dtype == dtype and got.shape == (4, 24)
    weight = layer.dequantize()
    assert weight.dtype == torch.float32 and weight.shape == (24, 67)
    values = x.double()
    exact = values @ weight.double().t() + bias.double()
    # Each weight is rounded to the type once, and the result once.
    size = values.abs() @ weight.double().abs().t() + bias.double().abs()
    allowed = 2 * torch.finfo(dtype).eps * size
    if spec in W8A8_SPECS:
        # Each input is off by half a step at the most.
        step = 2 * RANGE / 255 if spec.kind == "w8a8_static" else 2 * values.abs().amax() / 255
        allowed = allowed + step / 2 * 1.01 * weight.double().abs().sum(dim=1)
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_dequantize_is_half_a_step_from_the_weight(spec):
    layer, weight, _ = make(spec)
    error = (layer.dequantize() - weight).abs().double()
    if spec.kind == "dense":
        assert error.max() == 0
        return
    group = 67 if spec.group_size == -1 or spec in W8A8_SPECS else min(spec.group_size, 67)
    for index, start in enumerate(range(0, 67, group)):
        part = weight[:, start : start + group].double()
        if spec.scheme == "sym":
            width = 2 * part.abs().amax(dim=1)
        else:
            width = part.amax(dim=1).clamp(min=0) - part.amin(dim=1).clamp(max=0)
        step = width / (2**spec.bits - 1)
        stored = layer.scales.double().view(24, -1)[:, index]
        # float16 keeps 11 bits of the scale, which moves the ends of the grid.
        assert ((stored - step).abs() <= step * 2.0**-11 * 1.001).all()
        allowed = stored / 2 + (2**spec.bits - 1) * (stored - step).abs()
        assert (error[:, start : start + group] <= allowed[:, None] * 1.0001).all()


@pytest.mark.parametrize("spec", WEIGHT_ONLY, ids=spec_id)
def test_more_bits_are_closer(spec):
    if spec.bits == 1:
        # One bit has no level between the ends: nothing is claimed but that it is finite.
        assert make(spec)[0].dequantize().isfinite().all()
        return
    fewer = QuantSpec(spec.bits - 1, spec.group_size, spec.scheme, spec.kind)
    errors = []
    for other in (spec, fewer):
        layer, weight, _ = make(other)
        errors.append((layer.dequantize() - weight).square().mean())
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("bitwidth", "bits_per_weight"), [(str(bits), bits) for bits in range(1, 9)]
)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_nbytes_of_weight_only(group_size, scheme, bitwidth, bits_per_weight):
    rows, columns = 48, 256
    spec = QuantSpec.parse(bitwidth, group_size, scheme)
    layer, _, _ = make(spec, rows, columns, dtype=torch.bfloat16)
    groups = {-1: 1, 32: 8, 128: 2}[group_size]
    weights = rows * columns * bits_per_weight // 8
    scales, zeros = rows * groups * 2, rows * groups if scheme == "asym" else 0
    assert layer.nbytes() == weights + scales + zeros + rows * 2
    assert layer.nbytes() == sum(t.numel() * t.element_size() for t in layer.buffers())


def test_nbytes_of_the_others():
    rows, columns = 48, 256
    expected = {
        "16": rows * columns * 2,
        "8:tc-li": rows * columns + rows * 2,
        "8:tc": rows * columns + rows * 2 + 4,
    }
    found = {
        bitwidth: make(QuantSpec.parse(bitwidth), rows, columns, dtype=torch.bfloat16, bias=False)[
            0
        ].nbytes()
        for bitwidth in expected
    }
    assert found == expected


@pytest.mark.parametrize("spec", [s for s in SPECS if s.kind != "dense"], ids=spec_id)
def test_a_quantized_layer_keeps_no_float_copy(spec):
    layer, weight, _ = make(spec, 24, 256)
    assert layer.nbytes() < weight.nbytes / 2
    assert all(t.numel() < weight.numel() for t in layer.buffers() if t.is_floating_point())


@pytest.mark.parametrize("spec", WEIGHT_ONLY, ids=spec_id)
def test_weight_only_stands_for_its_integers(spec):
    layer, _, _ = make(spec)
    q = unpack(layer.qweight, spec.bits, 67).numpy().astype(np.int64)
    step = 67 if spec.group_size == -1 else spec.group_size
    index = np.arange(67) // step
    zeros = layer.qzeros.numpy().astype(np.int64)
    zero = zeros[:, index] if spec.scheme == "asym" else 2 ** (spec.bits - 1)
    expected = (q - zero) * layer.scales.double().numpy()[:, index]
    assert np.array_equal(layer.dequantize().double().numpy(), expected)


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.kind != "w8a8_static"], ids=spec_id
)
def test_the_others_need_none(spec):
    with_range, _, _ = make(spec, input_range=RANGE)
    without, _, _ = make(spec, input_range=None)
    x = normal(2, 67)
    assert torch.equal(processed(with_range)(x), processed(without)(x))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_layer_says_what_it_is(spec):
    layer, _, _ = make(spec)
    assert layer.extra_repr() == f"67 -> 24, {describe(spec)}"
    assert layer.extra_repr() in repr(layer)
    assert layer.choice.kernel.run is processed(layer).run and layer.choice.reason


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (QuantSpec(), "16 bits"),
        (QuantSpec.parse("4", 64), "4 bits, group 64, asym"),
        (QuantSpec.parse("1", -1, "sym"), "1 bit, channel, sym"),
        (QuantSpec.parse("8:tc-li"), "8:tc-li"),
        (QuantSpec.parse("8:tc"), "8:tc"),
    ],
)
def test_describe(spec, expected):
    assert describe(spec) == expected


def test_every_spec_has_a_name_of_its_own():
    assert len({spec_id(spec) for spec in SPECS}) == len(SPECS)


QUANTIZED = [spec for spec in SPECS if spec.kind != "dense"]


def stored(layer) -> list[torch.Tensor]:
    """What a checkpoint has of a layer."""
    return [*layer.packed[:3], *([*layer.integers] if layer.spec in W8A8_SPECS else [])]


@pytest.mark.parametrize("spec", QUANTIZED, ids=spec_id)
def test_a_kernel_changes_how_a_weight_lies_and_not_what_it_is(spec):
    layer, _, _ = make(spec)
    names = [name for name, _ in layer.named_buffers()]
    before, matrix = [t.clone() for t in stored(layer)], layer.dequantize()
    x = normal(5, 67, seed=2)
    first = processed(layer)(x)
    assert torch.equal(processed(layer)(x), first)
    assert [name for name, _ in layer.named_buffers()] == names
    for got, expected in zip(stored(layer), before, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert torch.equal(layer.dequantize(), matrix)
    assert torch.equal(layer.dequantize(slice(3, 9)), matrix[3:9])
    assert layer.choice.kernel.layout is layer.layout


@pytest.mark.parametrize("spec", QUANTIZED, ids=spec_id)
def test_a_weight_lies_in_memory_once(spec):
    layer, _, _ = make(spec, 48, 256)
    size, kept = layer.nbytes(), weakref.ref(layer.qweight)
    processed(layer)
    if layer.layout:
        assert kept() is None
        # 48 channels are full panels; 256 inputs are full K blocks, but for groups of 20.
        assert layer.nbytes() == size or (spec.group_size == 20 and layer.nbytes() < 2 * size)


@pytest.mark.parametrize("spec", QUANTIZED, ids=spec_id)
def test_a_layer_of_what_a_processed_one_holds_is_the_same(spec):
    layer = processed(make(spec)[0])
    x = normal(5, 67, seed=2)
    expected = layer(x)
    if spec.kind == "weight_only":
        again = WeightOnlyLinear.from_packed(layer.packed, layer.bias, spec, 67)
    else:
        scale = [layer.input_scale] if spec.kind == "w8a8_static" else []
        again = linear_class(spec)(*layer.integers, layer.bias, spec, *scale)
    assert torch.equal(processed(again)(x), expected)
    assert again.layout is layer.layout


@pytest.mark.parametrize("spec", QUANTIZED, ids=spec_id)
def test_a_copy_of_a_processed_layer_is_one(spec):
    layer = processed(make(spec)[0])
    x = normal(5, 67, seed=2)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("spec", QUANTIZED, ids=spec_id)
def test_forward_changes_no_layer_and_is_the_reference_s_until_it_is_processed(spec, monkeypatch):
    x = normal(5, 67, seed=2)
    layer = make(spec)[0]
    held = dict(layer.named_buffers())
    expected = layer(x)
    assert all(tensor is held[name] for name, tensor in layer.named_buffers())
    assert layer.layout is None and layer.run is getattr(ops.reference, layer.op)
    got = processed(layer)(x)
    monkeypatch.setattr(ops, "KERNELS", {op: kernels[-1:] for op, kernels in ops.KERNELS.items()})
    layer = processed(make(spec)[0])
    assert layer.choice.kernel.name == "reference" and layer.layout is None
    assert torch.equal(layer(x), expected)
    if spec in W8A8_SPECS:
        assert torch.equal(got, expected)
    else:
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.covering(1)
@pytest.mark.parametrize("spec", QUANTIZED, ids=spec_id)
@pytest.mark.parametrize(("rows", "columns"), [(1, 67), (24, 1), (1, 1), (17, 33)])
def test_shapes_with_little_in_them(spec, rows, columns):
    layer, _, bias = make(spec, rows, columns)
    matrix = layer.dequantize()
    x = normal(3, columns, seed=2).clamp(-RANGE, RANGE)
    got = processed(layer)(x)
    step = RANGE / 255 if spec in W8A8_SPECS else 0
    allowed = 1e-5 + 1.01 * step * matrix.abs().sum(dim=1)
    assert ((got - (x @ matrix.t() + bias)).abs() <= allowed).all()
    assert layer(x[:0]).shape == (0, rows)
