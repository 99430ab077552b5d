"""No GPU kernel reads or writes outside of its tensors: in the interpreter, between fences."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from cpu_paths import normal, random_weight
from fences import fenced, mappings, run_in

from qllm.ops.gpu import attention, layout, linear, prefill, rows
from qllm.ops.kv import KV, RUN, Batch
from qllm.ops.quantized_kv import QuantizedKV


def run_linear(dtype: torch.dtype, fence) -> None:
    shapes = ((1, 1, 1), (70, 67, 20), (65, 400, 1))
    formats = ((3, 32, "asym"), (4, -1, "sym"), (8, 20, "asym"))
    if dtype == torch.float32:  # each format meets two of the shapes
        formats = (formats[1], formats[2], formats[0])
    for (outputs, inputs, count), (bits, group, scheme) in zip(shapes, formats, strict=True):
        x, bias = fence(normal(count, inputs, dtype=dtype)), fence(normal(outputs, dtype=dtype))
        stored = random_weight((outputs, inputs), bits, group, scheme).stored
        tensors = [*map(fence, layout.pack(stored, bits, group, inputs)[:3])]
        given = (x, *tensors, bias, outputs, bits, group)
        linear.weight_only_linear(*given)
        for tile in (0, 128) if dtype == torch.bfloat16 else ():
            prefill.weight_only_linear(*given, tile=tile)
        linear.dense_linear(x, fence(normal(outputs, inputs, dtype=dtype)), bias)
        q = fence(torch.ones(outputs, inputs, dtype=torch.int8))
        for scale in (None, fence(torch.tensor(0.02))):
            linear.int8_linear(x, q, fence(torch.ones(outputs)), bias, scale, outputs)
        rows.gated_activation(fence(normal(count, 2 * inputs, dtype=dtype)), "silu")
        weight = fence(normal(inputs, dtype=dtype))
        rows.layer_norm_int8(x, weight, fence(normal(inputs, dtype=dtype)), 1e-5, None)
        rows.rms_norm_int8(x, weight, 1e-5, fence(torch.tensor(0.02)))
        rows.add_rms_norm(x, fence(normal(count, inputs, dtype=dtype)), weight, 1e-5)


def run_attention(dtype: torch.dtype, fence) -> None:
    attention.SPAN, attention.BLOCK = 32, 16
    for heads, kv_heads, dim in ((1, 1, 1), (4, 2, 2), (2, 1, 34)):
        slopes = fence(torch.ones(heads))
        for length in (1, 33):
            new = fence(normal(3, (heads + 2 * kv_heads) * dim, dtype=dtype))
            rotation = [*map(fence, normal(2, 3, dim, dtype=dtype))] if dim > 1 else None
            cache = KV(*map(fence, normal(2, 3, kv_heads, length, dim, dtype=dtype)))
            pasts = [length - 1, 0, length - 1]
            batch = Batch.of([1] * 3, "cpu", rows=[2, 0, 1], pasts=pasts)
            batch = Batch(*map(fence, batch[:3]), 1, length)
            attention.decode_attention(new, cache, batch, rotation, slopes)
        cache = KV(*map(fence, normal(2, 2, kv_heads, 17, dim, dtype=dtype)))
        new = fence(normal(18, (heads + 2 * kv_heads) * dim, dtype=dtype))
        rotation = [*map(fence, normal(2, 18, dim, dtype=dtype))] if dim > 1 else None
        batch = Batch.of([16, 2], "cpu", rows=[1, 0], pasts=[0, 15])
        batch = Batch(*map(fence, batch[:3]), 16, 17)
        attention.prefill_attention(new, cache, batch, rotation, slopes)
        for bits in (8, 4):
            options = (bits, 2, kv_heads, RUN, dim, dtype, "cpu")
            held = QuantizedKV(*map(fence, QuantizedKV.empty(*options)))
            for part, past in ((new, 0), (new[:2], 16)):
                lengths = [len(part) - 2, 2] if past == 0 else [1, 1]
                where = Batch.of(lengths, "cpu", rows=[1, 0], pasts=[past, 0])
                where = Batch(*map(fence, where[:3]), *where[3:])
                rotated = rotation and [fence(one[: len(part)].clone()) for one in rotation]
                attention.prefill_attention(fence(part.clone()), held, where, rotated, slopes)


def forbid_tensors_as_bounds() -> None:
    """Triton 3.6's interpreter has them as arrays of one number, which numpy 2.4 takes for none."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_strictly(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", None)

    interpreter._patch_lang_tensor = patch_strictly


def run_all() -> None:
    """Every kernel, all tensors fenced: those that it is given and those that it makes."""
    forbid_tensors_as_bounds()
    for at_end, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        fence = partial(fenced, at_end=at_end)

        def new_empty(x, *shape, dtype=None, device=None, fence=fence):
            return fence(torch.zeros(*shape, dtype=dtype or x.dtype))

        torch.Tensor.new_empty = new_empty
        for run in (run_linear, run_attention):
            run(dtype, fence)
            mappings.clear()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_nothing_outside_is_touched():
    done = run_in(Path(__file__), "run_all()", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_a_kernel_that_touched_it_would_die():
    command = (
        "from qllm.ops.gpu.kernels.rows import activate; x = fenced(torch.ones(1, 100),"
        " at_end=True); activate[(1, 1)](x, torch.ones(4000), 3000, NAME='silu', GATED=True,"
        " BLOCK=4096, LATE=False)"
    )
    done = run_in(Path(__file__), command, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode < 0
