"""What compressed-tensors writes and reads, by itself."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from stored_formats import (
    SCHEMES,
    drawn,
    float_weight,
    from_int_quantized,
    from_int_quantized_weight,
    from_pack_quantized,
    to_int_quantized,
    to_pack_quantized,
)

from qllm.checkpoint.formats import Int8Weight
from qllm.quant.packing import BITS, unpack
from qllm.quant.rtn import quantize_rtn


def scheme_of(bits: int, group_size: int, scheme: str, **inputs: object) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=scheme == "sym",
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    activations = QuantizationArgs(num_bits=8, **inputs) if inputs else None
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)


# With 8 rows or fewer, 0.20.0 cannot read its own 4-bit zero points (a view of a single word).
CT_SHAPES = [(32, 64, 16), (9, 96, 32), (33, 45, -1), (13, 20, 5)]


@pytest.mark.covering(2)
@pytest.mark.parametrize(("rows", "columns", "group_size"), CT_SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_reads_what_we_write(bits, scheme, rows, columns, group_size):
    weight = drawn(rows, columns, bits, group_size, scheme)
    weight = weight._replace(scales=weight.scales.float())
    found = PackedQuantizationCompressor.decompress(
        to_pack_quantized(weight, bits, group_size, columns), scheme_of(bits, group_size, scheme)
    )
    assert torch.equal(found["weight"], float_weight(weight, bits, group_size, columns))


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns", "group_size"), CT_SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", BITS)
def test_we_read_what_compressed_tensors_writes(bits, scheme, rows, columns, group_size, dtype):
    random = torch.Generator().manual_seed(bits)
    groups = 1 if group_size == -1 else columns // group_size
    limit = 2 ** (bits - 1)
    state = {
        "weight": torch.randn(rows, columns, generator=random).to(dtype),
        "weight_scale": (torch.rand(rows, groups, generator=random) * 2 / limit + 0.01).to(dtype),
        "weight_zero_point": torch.randint(
            -limit, limit, (rows, groups), generator=random, dtype=torch.int8
        ),
    }
    if scheme == "sym":
        state["weight_zero_point"].zero_()
    described = scheme_of(bits, group_size, scheme)
    for compressor, read in (
        (PackedQuantizationCompressor, from_pack_quantized),
        (IntQuantizationCompressor, from_int_quantized_weight),
    ):
        tensors = compressor.compress(state, described)
        expected = compressor.decompress(tensors, described)["weight"]
        found = read(tensors, bits, group_size, columns, rows)
        assert torch.equal(float_weight(found, bits, group_size, columns).to(dtype), expected)
        again = to_pack_quantized(found, bits, group_size, columns)
        if compressor is PackedQuantizationCompressor:
            assert set(again) == set(tensors)
            for name in set(tensors) - {"weight_scale"}:
                assert torch.equal(again[name], tensors[name])


@pytest.mark.parametrize("static", [False, True])
def test_int_quantized_both_ways_with_compressed_tensors(static):
    inputs = {"strategy": "tensor"} if static else {"strategy": "token", "dynamic": True}
    described = scheme_of(8, -1, "sym", **inputs)
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    packed, scales, *_ = quantize_rtn(weight, 8, -1, "sym")
    ours = Int8Weight(
        (unpack(packed, 8, 40) - 128).view(torch.int8),
        scales[:, 0],
        torch.tensor(0.125) if static else None,
    )
    tensors = to_int_quantized(ours)
    read = IntQuantizationCompressor.decompress(tensors, described)["weight"]
    assert torch.equal(read, ours.qweight.half() * ours.scales[:, None])
    state = {"weight": read, "weight_scale": scales}
    if static:
        state["input_scale"] = torch.tensor([0.125])
    written = IntQuantizationCompressor.compress(state, described)
    found = from_int_quantized(written, 40, 24, static=static)
    for a, b in zip(found, ours, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_one_scale_for_a_whole_matrix():
    tensors = {"weight": torch.ones(3, 4, dtype=torch.int8), "weight_scale": torch.tensor([0.5])}
    for scale in (torch.tensor([0.5]), torch.tensor(0.5), torch.tensor([[0.5]])):
        found = from_int_quantized(tensors | {"weight_scale": scale}, 4, 3, static=False)
        assert found.scales.tolist() == [0.5, 0.5, 0.5]
