"""Rows of activations: sums, norms, to int8, and activation functions of them."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.ops import phase, reference
from qllm.ops.gpu import cuda, device
from qllm.ops.reference import Int8Rows

NO_NORM, LAYER_NORM, RMS_NORM = range(3)
COLUMNS_AT_ONCE = 1024  # that a program activates
ALIGNED = 8  # numbers of 16 bits that products load at once
LONG = 8192  # columns beyond which a prompt's rows become int8 in chunks
CHUNK, MANY = 4096, 1024  # columns of one; and rows from which on programs have fewer warps


def side_by_side(x: Tensor) -> Tensor:
    """x (M, K) with the columns of a row without gaps; rows may lie apart."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """x (M, K) with rows that begin where ALIGNED numbers can be loaded, and end with such."""
    if x.shape[1] % ALIGNED:  # else torch would copy it as well
        x = pad(x, (0, -x.shape[1] % ALIGNED))
    bytes_at_once = ALIGNED * x.element_size()
    if x.stride(1) == 1 and x.stride(0) % ALIGNED == 0 and x.data_ptr() % bytes_at_once == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def quantize(x: Tensor, input_scale: Tensor | None) -> Int8Rows:
    """`reference.quantize_rows`."""
    if (
        input_scale is None
        and x.shape[1] > LONG
        and x.dtype in cuda.DTYPES
        and not phase.decoding()
    ):
        return _quantize_in_chunks(x)
    return _run(x, None, NO_NORM, None, None, 0.0, (input_scale,))[1]


def _quantize_in_chunks(x: Tensor) -> Int8Rows:
    from qllm.ops.gpu.kernels.rows import quantize_rows

    x = side_by_side(x)
    rows, columns = x.shape
    out = x.new_empty(rows, columns, dtype=torch.int8)
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    if rows:
        with device.current(x):
            quantize_rows[(rows,)](
                x, x.stride(0), out, scales, columns, CHUNK=CHUNK,
                FUSED=not device.interpreting(),  # which has no fused operation
                num_warps=16 if rows < MANY else 8,
                enable_fp_fusion=False,
            )  # fmt: skip
    return Int8Rows(out, scales, x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`reference.rms_norm`; in one launch, where torch would take several."""
    if not offset:
        return reference.rms_norm(x, weight, eps)
    return _run(x, None, RMS_NORM, weight, None, eps, None, offset)[1]


def qk_norm(
    qkv: Tensor,
    weight: Tensor,
    heads: int,
    kv_heads: int,
    eps: float,
    offset: float = 0.0,
    values: bool = False,
) -> Tensor:
    """`reference.qk_norm`."""
    runs = (heads + 2 * kv_heads, heads, kv_heads, kv_heads if values else 0)
    rows = qkv.contiguous().view(len(qkv) * runs[0], -1)
    return _run(rows, None, RMS_NORM, weight, None, eps, None, offset, runs)[1].view(qkv.shape)


def wide_qk_norm(
    qkv: Tensor, weight: Tensor, queries: int, keys: int, eps: float, offset: float = 0.0
) -> Tensor:
    """`reference.wide_qk_norm`."""
    q, k, v = qkv.tensor_split([queries, queries + keys], dim=1)
    normed = [
        _run(part, None, RMS_NORM, each, None, eps, None, offset)[1]
        for part, each in zip((q, k), weight.split([queries, keys]), strict=True)
    ]
    return torch.cat([*normed, v], dim=1)


def layer_norm_int8(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, input_scale: Tensor | None
) -> Int8Rows:
    """`reference.layer_norm_int8`."""
    return _run(x, None, LAYER_NORM, weight, bias, eps, (input_scale,))[1]


def rms_norm_int8(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    input_scale: Tensor | None,
    offset: float = 0.0,
) -> Int8Rows:
    """`reference.rms_norm_int8`."""
    return _run(x, None, RMS_NORM, weight, None, eps, (input_scale,), offset)[1]


def add_layer_norm(
    x: Tensor, z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + z, and `reference.layer_norm` of it."""
    return _run(x, z, LAYER_NORM, weight, bias, eps, None)


def add_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x + z, and `reference.rms_norm` of it."""
    return _run(x, z, RMS_NORM, weight, None, eps, None, offset)


def add_layer_norm_int8(
    x: Tensor, z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    input_scale: Tensor | None,
) -> tuple[Tensor, Int8Rows]:  # fmt: skip
    """x + z, and `reference.layer_norm_int8` of it."""
    return _run(x, z, LAYER_NORM, weight, bias, eps, (input_scale,))


def add_rms_norm_int8(
    x: Tensor, z: Tensor, weight: Tensor | None, eps: float, input_scale: Tensor | None,
    offset: float = 0.0,
) -> tuple[Tensor, Int8Rows]:  # fmt: skip
    """x + z, and `reference.rms_norm_int8` of it."""
    return _run(x, z, RMS_NORM, weight, None, eps, (input_scale,), offset)


# What adds to the rows in front of a norm, by the op of the norm.
ADD_NORM = {
    "layer_norm": add_layer_norm,
    "rms_norm": add_rms_norm,
    "layer_norm_int8": add_layer_norm_int8,
    "rms_norm_int8": add_rms_norm_int8,
}


@overload
def _run(
    x: Tensor, z: Tensor | None, norm: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    quantized: None, offset: float = ..., runs: tuple[int, int, int, int] = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def _run(
    x: Tensor, z: Tensor | None, norm: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    quantized: tuple[Tensor | None], offset: float = ..., runs: tuple[int, int, int, int] = ...,
) -> tuple[Tensor, Int8Rows]: ...  # fmt: skip
def _run(
    x: Tensor,
    z: Tensor | None,
    norm: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    quantized: tuple[Tensor | None] | None,
    offset: float = 0.0,
    runs: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> tuple[Tensor, Tensor | Int8Rows]:
    """x + z, or x, and what follows.

    Args:
        offset: is added to the weight.
        runs: RUN, FIRST, SECOND and THIRD of the kernel.
        quantized: to int8, by a scale or (None) one for each row; None: not at all.
    """
    from qllm.ops.gpu.decode import launch_options
    from qllm.ops.gpu.kernels.rows import norm_rows

    x = side_by_side(x)
    z = None if z is None else side_by_side(z)
    rows, columns = x.shape
    sums = x if z is None else x.new_empty(rows, columns)
    out = x.new_empty(rows, columns, dtype=torch.int8 if quantized else x.dtype)
    scales = quantized[0] if quantized else None
    static = scales is not None
    if quantized and not static:
        scales = x.new_empty(rows, 1, dtype=torch.float32)
    width = 1 << (columns - 1).bit_length()
    if rows:
        with device.current(x):
            norm_rows[(rows,)](
                x,
                x.stride(0),
                z,
                0 if z is None else z.stride(0),
                sums,
                weight,
                bias,
                out,
                scales,
                columns,
                eps,
                offset,
                WIDTH=width,
                ADD=z is not None,
                NORM=norm,
                HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None,
                QUANTIZE=quantized is not None,
                STATIC=static,
                RUN=runs[0],
                FIRST=runs[1],
                SECOND=runs[2],
                THIRD=runs[3],
                num_warps=min(16 if norm else 32, max(1, width // 256)),
                enable_fp_fusion=False,  # each step is rounded, as the reference's are
                **launch_options(x.device),
            )
    return sums, out if scales is None else Int8Rows(out, scales, x.dtype)


def activation(x: Tensor, name: str) -> Tensor:
    """`reference.activation`."""
    return _activate(x, name, gated=False)


def gated_activation(x: Tensor, name: str) -> Tensor:
    """`reference.gated_activation`, in one launch."""
    return _activate(x, name, gated=True)


def _activate(x: Tensor, name: str, *, gated: bool) -> Tensor:
    from qllm.ops.gpu.decode import launch_options
    from qllm.ops.gpu.kernels.rows import activate

    if x.dtype == torch.float32:  # in which a GPU's exponentials are two last digits off
        return (reference.gated_activation if gated else reference.activation)(x, name)
    rows, columns = len(x), x.shape[1] // (1 + gated)
    y = x.new_empty(rows, columns)
    if rows:
        with device.current(x):
            activate[-(-columns // COLUMNS_AT_ONCE), rows](
                x.contiguous(), y, columns, NAME=name, GATED=gated, BLOCK=COLUMNS_AT_ONCE,
                num_warps=4, **launch_options(x.device),
            )  # fmt: skip
    return y
