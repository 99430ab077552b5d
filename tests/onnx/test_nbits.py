"""MatMulNBits: what is written is the matrix, by the definition and in onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qllm.config import BITWIDTHS, SCHEMES, QuantSpec
from qllm.errors import UserError
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.onnx.nbits import BITS, DOMAIN, OPERATOR, NBits, block_size
from qllm.onnx.runner import session
from qllm.quant.packing import PackedWeight

FLOAT32 = torch.float32


def written(rows: int, columns: int, spec: QuantSpec) -> tuple[NBits, torch.Tensor]:
    """A random matrix as the operator takes it, and in float32."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    layer = WeightOnlyLinear.from_float(weight, None, spec)
    return NBits.of(layer.packed, spec, columns, FLOAT32, "w"), layer.dequantize()


def by_definition(matrix: NBits, rows: int) -> np.ndarray:
    """onnxruntime's documentation of the operator, value by value: (N, K)."""
    bits, block, blocks = matrix.bits, matrix.block, matrix.weight.shape[1]

    def stream(data: np.ndarray, count: int) -> np.ndarray:
        unpacked = np.unpackbits(data, bitorder="little").reshape(-1, bits)[:count]
        return (unpacked * (1 << np.arange(bits))).sum(1)

    values = np.zeros((rows, blocks * block), np.float32)
    scales = matrix.scales.numpy().reshape(rows, blocks)
    for row in range(rows):
        zeros = np.full(blocks, 2 ** (bits - 1))
        if matrix.zeros is not None:
            zeros = stream(matrix.zeros.numpy().reshape(rows, -1)[row], blocks)
        for index in range(blocks):
            q = stream(matrix.weight[row, index].numpy(), block)
            span = slice(index * block, (index + 1) * block)
            values[row, span] = (q - zeros[index]).astype(np.float32) * scales[row, index]
    return values[:, : matrix.columns]


@pytest.mark.covering(2)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 32, 48, 64, 512, -1])
@pytest.mark.parametrize("columns", [16, 97, 131, 640])
def test_the_matrix_is_what_it_was(columns, group, bits, scheme):
    matrix, dense = written(7, columns, QuantSpec.parse(str(bits), group, scheme))
    np.testing.assert_array_equal(by_definition(matrix, 7), dense.numpy())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("columns", "group"), [(64, 16), (97, 32), (256, 48), (131, -1)])
def test_onnxruntime_multiplies_by_it(columns, group, bits, scheme):
    matrix, dense = written(9, columns, QuantSpec.parse(str(bits), group, scheme))
    tensors = {"w": matrix.weight, "s": matrix.scales}
    tensors |= {} if matrix.zeros is None else {"z": matrix.zeros}
    settings = {"N": 9, "K": columns, "bits": bits, "block_size": matrix.block}
    node = helper.make_node(OPERATOR, ["x", *tensors], ["y"], domain=DOMAIN, **settings)
    ends = [helper.make_tensor_value_info(e, TensorProto.FLOAT, [None, None]) for e in "xy"]
    given = [numpy_helper.from_array(tensor.numpy(), key) for key, tensor in tensors.items()]
    graph = helper.make_graph([node], "one", ends[:1], ends[1:], given)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    (y,) = session(model.SerializeToString()).run(["y"], {"x": x.numpy()})
    want = (x.double() @ dense.double().t()).numpy()
    assert np.abs(y - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("bitwidth", [b for b in BITWIDTHS if b not in ("4", "8")])
def test_other_bits_are_refused(bitwidth):
    with pytest.raises(UserError, match=f"w is at bitwidth {bitwidth}.*takes 4 and 8 bits"):
        block_size(QuantSpec.parse(bitwidth), "w")


@pytest.mark.parametrize("group", [1, 8, 20, 100, 129])
def test_other_groups_are_refused(group):
    with pytest.raises(UserError, match=f"group size {group}; .* takes 16 and its multiples"):
        block_size(QuantSpec.parse("4", group), "w")


def test_scales_that_float16_cannot_hold_are_refused():
    packed = PackedWeight(
        torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([[1e-9]]), torch.zeros(0)
    )
    with pytest.raises(UserError, match="`dtype` float32"):
        NBits.of(packed, QuantSpec.parse("4", -1, "sym"), 32, torch.float16, "w")
