"""How weights become numbers on a GPU: two at once, by instructions that the interpreter lacks.

Here it has them: what they do is carried out on integers, as NVIDIA's PTX ISA says.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_paths import random_weight
from gpu_kernels import packed

from qllm.ops.gpu import cuda, linear, prefill
from qllm.ops.reference import dequantize
from qllm.quant.packing import BITS

OUTPUTS, INPUTS = 20, 128


def halves(words: np.ndarray, bfloat16: bool) -> np.ndarray:
    """Pairs of 16-bit numbers (…,) as float32 (…, 2)."""
    low = words.astype(np.int32).view(np.uint16).reshape(*words.shape, 2)
    if bfloat16:
        return (low.astype(np.uint32) << 16).view(np.float32)
    return low.view(np.float16).astype(np.float32)


def pairs(numbers: np.ndarray, bfloat16: bool) -> np.ndarray:
    """The inverse, for numbers that the type has: each sum here is one of those."""
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    rounded = torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype)
    assert torch.equal(rounded.float(), torch.from_numpy(numbers))
    return rounded.view(torch.int16).numpy().view(np.int32)[..., 0]


def carried_out(asm: str, operands: list[np.ndarray]) -> np.ndarray:
    name = asm.split(maxsplit=1)[0]
    if name == "lop3.b32" and asm.endswith("0xEA;"):
        a, b, c = operands
        return (a & b) | c
    if name == "shf.r.wrap.b32":
        bits, by = operands[0].view(np.uint32).astype(np.uint64), operands[1].astype(np.uint64) & 31
        return (((bits << 32) | bits) >> by).astype(np.uint32).view(np.int32)
    if name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
        a, b, c = (halves(words, "bf16" in name) for words in operands)
        return pairs(a * b + c, "bf16" in name)
    raise AssertionError(asm)


@pytest.fixture
def on_pairs(gpu, monkeypatch) -> str:
    """A GPU, or the interpreter with a GPU's instructions."""
    if gpu == "cuda":
        return gpu
    import triton.language as tl

    from qllm.ops.gpu.kernels import matmul, prefill_matmul

    def asm(text, constraints, given, dtype, is_pure, pack):
        like = given[0] & 0
        for one in given[1:]:
            like = like | (one & 0 if hasattr(one, "handle") else 0)
        data = [
            one.handle.data if hasattr(one, "handle") else np.int64(getattr(one, "value", one))
            for one in given
        ]
        words = [np.broadcast_to(each, like.handle.data.shape).astype(np.int32) for each in data]
        like.handle.data = carried_out(text, words)
        return like

    monkeypatch.setattr(tl, "inline_asm_elementwise", asm)
    for module in (matmul, prefill_matmul):
        monkeypatch.setattr(module, "INTERPRETED", False)
    return gpu


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_the_reference_s(bits, dtype, on_pairs, monkeypatch):
    """To the bit where they are rounded; where sums are scaled, as far as one product goes."""
    scheme = ("asym", "sym", "offset")[bits % 3] if bits > 1 else "asym"
    group = 32 if bits % 2 else 64
    weight = random_weight((OUTPUTS, INPUTS), bits, group, scheme)
    wanted = dequantize(*weight.stored[:3], bits, group, INPUTS, dtype).t()
    tensors = (*packed(weight, on_pairs)[:3], None, OUTPUTS, bits, group)
    x = torch.eye(INPUTS, dtype=dtype, device=on_pairs)
    if on_pairs == "cpu" or not prefill.unsupported_reason(torch.device("cuda", 0)):
        for tile in (0, prefill.ROWS[1]):
            assert torch.equal(prefill.weight_only_linear(x, *tensors, tile=tile).cpu(), wanted)
    monkeypatch.setattr(prefill, "unsupported_reason", lambda device: "it is not asked")
    # For many rows integers are unpacked first, which in bfloat16 the interpreter rounds once more.
    many = [linear.MANY_ROWS] if bits % 4 == 0 and dtype == torch.float16 else []
    for rows in (INPUTS, *many):
        some = torch.nn.functional.pad(x, (0, 0, 0, rows - INPUTS))
        found = linear.weight_only_linear(some, *tensors).cpu()
        assert torch.equal(found[:INPUTS], wanted) and not found[INPUTS:].any()
