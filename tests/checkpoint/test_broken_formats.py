"""Tensors of quantized checkpoints that are not what they should be, or odd."""

from __future__ import annotations

import pytest
import torch
from stored_formats import (
    assert_same,
    awq_tensors,
    drawn,
    from_awq,
    from_bitnet,
    from_gptq,
    from_hqq,
    from_int_quantized,
    from_int_quantized_weight,
    from_pack_quantized,
    from_torchao,
    from_torchao_int4,
    to_gptq,
    to_int_quantized,
    to_pack_quantized,
)

from qllm.checkpoint.formats import Int8Weight
from qllm.config import QuantSpec
from qllm.errors import UserError

GPTQ = to_gptq(drawn(6, 40, 4, 16, "asym"), 4, 16, 40)  # qweight (5, 6), qzeros (3, 1)
AWQ = awq_tensors(drawn(8, 40, 4, 16, "asym"), 40)
PACKED = to_pack_quantized(drawn(6, 40, 4, 16, "asym"), 4, 16, 40)
INT8 = to_int_quantized(
    Int8Weight(torch.ones(6, 40, dtype=torch.int8), torch.ones(6), torch.tensor(0.5))
)
INT4 = {
    "weight": torch.full((6, 40), 7, dtype=torch.int8),
    "weight_scale": torch.ones(6, 3),
    "weight_zero_point": torch.full((6, 3), -8, dtype=torch.int8),
}
BITNET = {"weight": torch.full((2, 40), 0x46, dtype=torch.uint8), "weight_scale": torch.ones(1)}
HQQ = {
    "W_q": torch.full((9, 20), 0x5A, dtype=torch.uint8),
    "scale": torch.ones(18, 1),
    "zero": torch.full((18, 1), 7.5),
}
HQQ6 = HQQ | {"W_q": torch.full((18, 20), 63, dtype=torch.uint8)}
AO8 = {
    "_weight_qdata": torch.ones(6, 40, dtype=torch.int8),
    "_weight_scale": torch.ones(6, 1),
    "_weight_zero_point": torch.zeros(6, 1, dtype=torch.int8),
}
AO4 = {
    "_weight_qdata": torch.ones(6, 20, dtype=torch.int8),
    "_weight_scale": torch.ones(3, 6),
    "_weight_zero_point": torch.ones(3, 6),
}
READERS = {
    "gptq": (GPTQ, lambda t: from_gptq(t, 4, 16, 40, 6, v1=False)),
    "gptq v1": (GPTQ, lambda t: from_gptq(t, 4, 16, 40, 6, v1=True)),
    "awq": (AWQ, lambda t: from_awq(t, 16, 40, 8)),
    "pack-quantized": (PACKED, lambda t: from_pack_quantized(t, 4, 16, 40, 6)),
    "int-quantized": (INT8, lambda t: from_int_quantized(t, 40, 6, static=True)),
    "int-quantized weight": (INT4, lambda t: from_int_quantized_weight(t, 4, 16, 40, 6)),
    "hqq": (HQQ, lambda t: from_hqq(t, 4, 20, 60, 6)),
    "hqq, 6 bits": (HQQ6, lambda t: from_hqq(t, 6, 20, 60, 6)),
    "torchao": (AO8, lambda t: from_torchao(t, QuantSpec(8, -1, "asym", "weight_only"), 40, 6)),
    "torchao-int4": (AO4, lambda t: from_torchao_int4(t, 16, 40, 6)),
    "bitnet": (BITNET, lambda t: from_bitnet(t, 40, 8)),
}
REQUIRED = {
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
    "int-quantized": ("weight", "weight_scale", "input_scale"),
    "int-quantized weight": ("weight", "weight_scale"),
    "bitnet": ("weight", "weight_scale"),
    "hqq": ("W_q", "scale", "zero"),
    "torchao": ("_weight_qdata", "_weight_scale"),
    "torchao-int4": ("_weight_qdata", "_weight_scale", "_weight_zero_point"),
}


@pytest.mark.parametrize("kind", READERS)
def test_the_tensors_to_be_spoilt_are_whole(kind):
    tensors, read = READERS[kind]
    read(tensors)


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in REQUIRED.items() for n in names])
def test_a_missing_tensor_is_named(kind, name):
    tensors, read = READERS[kind]
    with pytest.raises(UserError, match=f"^{name} is missing$"):
        read({key: tensor for key, tensor in tensors.items() if key != name})


EVERY = [(kind, name) for kind, (tensors, _) in READERS.items() for name in tensors]
SPOILT = {
    "one less": lambda t: t[:-1],
    "one more": lambda t: torch.cat([t, t[-1:]]),
    "narrower": lambda t: t[..., :-1] if t.dim() > 1 else t[:-1],
    "wider": lambda t: torch.cat([t, t[..., -1:]], dim=-1),
    "one dimension more": lambda t: t[None, None],
    "empty": lambda t: t[:0],
    "of another type": lambda t: t.to(torch.float64),
    "of booleans": lambda t: t.bool(),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_spoilt_tensor_is_named(kind, name, spoil):
    tensors, read = READERS[kind]
    with pytest.raises(UserError, match=rf"^{name} is \w+ \(.*\), expected [\w ]+ \(.*\)$"):
        read(tensors | {name: spoil(tensors[name])})


def changed(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3 % tensor.numel()] = value
    return tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, n in EVERY if "scale" in n])
def test_scales_that_are_not_finite_are_refused(kind, name, value):
    tensors, read = READERS[kind]
    with pytest.raises(UserError, match=f"^{name} holds NaN or infinite values$"):
        read(tensors | {name: changed(tensors[name], value)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "g_idx holds groups from -1 to 2; the layer has 3"),
        (3, "g_idx holds groups from 0 to 3; the layer has 3"),
        (2**31 - 1, "g_idx holds groups from 0 to 2147483647; the layer has 3"),
        (2, "g_idx has groups of other sizes than 16"),
    ],
)
def test_a_g_idx_that_cannot_be(value, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        READERS["gptq"][1](GPTQ | {"g_idx": changed(GPTQ["g_idx"], value)})
    with pytest.raises(UserError, match=f"^weight_{message}$"):
        READERS["pack-quantized"][1](PACKED | {"weight_g_idx": changed(GPTQ["g_idx"], value)})


def test_a_g_idx_nobody_set_orders_nothing():
    unset = PACKED | {"weight_g_idx": torch.full((40,), -1, dtype=torch.int32)}
    assert READERS["pack-quantized"][1](unset).perm is None


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "message"),
    [
        (
            "pack-quantized",
            "weight_shape",
            torch.tensor([40, 6]),
            r"weight_shape is \[40, 6\], expected \[6, 40\]",
        ),
        (
            "int-quantized",
            "weight_zero_point",
            torch.ones(6, 1, dtype=torch.int8),
            "weight_zero_point is not 0; with int8 activations QLLM reads symmetric grids",
        ),
        (
            "int-quantized",
            "input_zero_point",
            torch.ones(1, dtype=torch.int8),
            "input_zero_point is not 0; with int8 activations QLLM reads symmetric grids",
        ),
        ("int-quantized", "input_scale", torch.zeros(1), "input_scale is 0.0, expected a number"),
        (
            "int-quantized weight",
            "weight",
            torch.full((6, 40), 8, dtype=torch.int8),
            "weight holds values from 8 to 8; 4 bits hold -8 to 7",
        ),
        (
            "int-quantized weight",
            "weight_zero_point",
            torch.full((6, 3), -9, dtype=torch.int8),
            "weight_zero_point holds values from -9 to -9; 4 bits hold -8 to 7",
        ),
        (
            "bitnet",
            "weight",
            torch.full((2, 40), 0x49 | 3 << 4, dtype=torch.uint8),
            "weight holds a 3, expected 0, 1 and 2 for -1, 0 and 1",
        ),
        ("hqq, 6 bits", "W_q", HQQ6["W_q"] + 1, "W_q holds 64, which 6 bits do not"),
        ("hqq", "zero", torch.full((18, 1), torch.inf), "zero holds NaN or infinite values"),
        ("hqq", "shape", torch.tensor([60, 6]), r"shape is \[60, 6\], expected \[6, 60\]"),
        ("hqq", "nbits", torch.tensor(3), r"nbits is \[3\], expected \[4\]"),
        ("hqq", "group_size", torch.ones(9), r"group_size is \[1.0, 1.0, 1.0\], expected \[20\]"),
        ("hqq", "view_as_float", torch.tensor(True), r"view_as_float is \[True\], expected"),
        ("bitnet", "weight_scale", torch.zeros(1), "weight_scale is 0.0, which nothing can be"),
    ],
)
def test_values_that_cannot_be(kind, name, tensor, message):
    tensors, read = READERS[kind]
    with pytest.raises(UserError, match=f"^{message}"):
        read(tensors | {name: tensor})


def test_a_width_that_cannot_be_packed():
    with pytest.raises(UserError, match="cannot hold 12 output channels: AWQ packs them by 8"):
        from_awq(AWQ, 16, 40, 12)
    with pytest.raises(UserError, match="cannot hold 10 output channels: BitNet packs them by 4"):
        from_bitnet(BITNET, 40, 10)


def test_a_group_size_of_any_size():
    """A config may name a number that no tensor index can be."""
    weight = drawn(6, 40, 4, -1, "asym")
    for size in (40, 41, 2**63, 10**30):
        tensors = to_gptq(weight, 4, size, 40)
        assert_same(from_gptq(tensors, 4, size, 40, 6, v1=False), weight)
