"""The CPU kernels: C++ behind a C interface (`src/kernels.h`), compiled at first use.

One library holds a path for each instruction set, and takes the best that the machine has;
`QLLM_CPU_PATH` names a lesser one. A row's result is the same to the bit on every path, whatever
else is computed beside it and by however many threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

import torch
from torch import Tensor

from qllm.errors import UserError
from qllm.ops.cpu import build
from qllm.quant.packing import PackedWeight, packed_size

# What each path is built on, the best one first.
PATHS = {
    "avx512": "AVX-512 VNNI",
    "avxvnni": "AVX-VNNI",
    "avx2": "AVX2",
    "scalar": "no vector instructions",
}
LANES, SLAB, VECTOR = 16, 32, 64  # of the layout, as in kernels.h
SMALLEST_GROUP = 16  # every group is filled up to a slab
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
WEIGHT_ONLY, INT8_DYNAMIC, INT8_STATIC = range(3)


def _structure(name: str, text: str) -> type[ctypes.Structure]:
    """A C structure of int64 and, where a name begins with *, pointers."""
    kinds = {True: ctypes.c_void_p, False: ctypes.c_int64}
    fields = [(word.lstrip("*"), kinds[word.startswith("*")]) for word in text.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# As in kernels.h.
Linear = _structure(
    "Linear",
    "rows inputs outputs bits group mode *x x_type x_stride *y *q *scales scale_type *zeros *bias "
    "*input_scale",
)
Packing = _structure(
    "Packing",
    "inputs outputs bits group *rows row_bytes *row_scales *row_zeros scale_bytes *q *scales "
    "*zeros",
)


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels, on the path that `QLLM_CPU_PATH` names or the best there is.

    Raises:
        build.Unavailable: they cannot be had here.
        UserError: for a path that is unknown, or that this machine lacks.
    """
    loaded = build.load()
    loaded.qllm_features.restype = ctypes.c_int64
    loaded.qllm_best.restype = ctypes.c_char_p
    for name in ("qllm_use", "qllm_linear"):
        getattr(loaded, name).restype = ctypes.c_bool
    features = ctypes.c_int64(loaded.qllm_features())
    best = loaded.qllm_best(features).decode()
    name = os.environ.get("QLLM_CPU_PATH") or best
    if not loaded.qllm_use(name.encode(), features):
        known = [path for path in PATHS if loaded.qllm_use(path.encode(), features)]
        loaded.qllm_use(best.encode(), features)
        raise UserError(f"QLLM_CPU_PATH={name!r} cannot run here; choose {', '.join(known)}")
    loaded.path = name
    return loaded


@cache
def unavailable() -> str | None:
    """Why there are no kernels, None where there are; the first call says it on standard error."""
    try:
        library()
    except build.Unavailable as error:
        print(f"note: {error}; running plain torch ops, which are slow", file=sys.stderr)
        return str(error)
    return None


def about() -> str:
    """The path in use."""
    return f"{PATHS[library().path]}; activations as integers, exact sums within a group"


def why_not(device: str, in_features: int, group_size: int) -> str | None:
    """Why a layer cannot run here, None where it can."""
    if device != "cpu":
        return "it is for CPUs"
    if 0 < min(group_size, in_features) < SMALLEST_GROUP and group_size < in_features:
        return f"groups of fewer than {SMALLEST_GROUP} inputs"
    reason = unavailable()
    return None if reason is None else f"not on this machine: {reason}"


def _pointer(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None and tensor.numel() else None


def _shape(in_features: int, bits: int, group_size: int) -> tuple[int, int, int]:
    """Group size, groups and slabs of a row."""
    group = in_features if group_size == -1 else min(group_size, in_features)
    full, rest = divmod(in_features, group)
    slabs = full * -(-group // SLAB) + -(-rest // SLAB)
    return group, full + (rest > 0), slabs


def pack(weight: PackedWeight, bits: int, group_size: int, in_features: int) -> PackedWeight:
    """A weight (N, K) in the kernels' layout.

    Returns:
        qweight uint8 (ceil(N / 16), slabs, bits, 64), a slab being 32 inputs of a group or the
        rest of it; scales (ceil(N / 16), G, 16) and qzeros uint8 of that shape, or empty.
    """
    group, groups, slabs = _shape(in_features, bits, group_size)
    out_features = len(weight.qweight)
    panels = -(-out_features // LANES)
    rows, scales, zeros = (tensor.contiguous() for tensor in weight[:3])
    grid = (panels, groups, LANES)
    packed = PackedWeight(
        rows.new_empty(panels, slabs, bits, VECTOR),
        scales.new_empty(grid),
        zeros.new_empty(grid if zeros.numel() else 0),
    )
    _move(
        library().qllm_pack, (in_features, out_features, bits, group), (rows, scales, zeros), packed
    )
    return packed


def unpack(
    packed: PackedWeight, bits: int, group_size: int, in_features: int, out_features: int
) -> PackedWeight:
    """The inverse of `pack`."""
    group, groups, _ = _shape(in_features, bits, group_size)
    rows = packed.qweight.new_zeros(out_features, packed_size(in_features, bits))
    scales = packed.scales.new_empty(out_features, groups)
    zeros = packed.qzeros.new_empty((out_features, groups) if packed.qzeros.numel() else 0)
    _move(
        library().qllm_unpack,
        (in_features, out_features, bits, group),
        (rows, scales, zeros),
        packed,
    )
    return PackedWeight(rows, scales, zeros)


def _move(
    function: ctypes._CFuncPtr,
    shape: tuple[int, int, int, int],
    stored: tuple[Tensor, Tensor, Tensor],
    packed: PackedWeight,
) -> None:
    """Call `qllm_pack` or `qllm_unpack`."""
    rows, scales, zeros = stored
    arguments = (_pointer(rows), rows.stride(0), _pointer(scales), _pointer(zeros))
    kept = (scales.element_size(), *map(_pointer, packed[:3]))
    function(ctypes.byref(Packing(*shape, *arguments, *kept)))


def weight_only_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """`reference.weight_only_linear` on tensors of `pack`."""
    shape = (out_features, bits, group_size)
    return _linear(x, PackedWeight(qweight, scales, qzeros), bias, shape, WEIGHT_ONLY)


def int8_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_features: int,
) -> Tensor:
    """`reference.int8_linear` on tensors of `pack`: 8 bits, symmetric, one group."""
    mode = INT8_DYNAMIC if input_scale is None else INT8_STATIC
    weight = PackedWeight(qweight, scales, qweight.new_empty(0))
    return _linear(x, weight, bias, (out_features, 8, -1), mode, input_scale)


def _linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    mode: int,
    input_scale: Tensor | None = None,
) -> Tensor:
    out_features, bits, group_size = shape
    rows, in_features = x.shape
    x = x if x.stride(1) == 1 or in_features == 1 else x.contiguous()
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    y = x.new_empty(rows, out_features)
    arguments = Linear(
        rows,
        in_features,
        out_features,
        bits,
        in_features if group_size == -1 else min(group_size, in_features),
        mode,
        _pointer(x),
        TYPES[x.dtype],
        x.stride(0),
        _pointer(y),
        _pointer(weight.qweight),
        _pointer(weight.scales),
        TYPES[weight.scales.dtype],
        _pointer(weight.qzeros),
        _pointer(bias),
        _pointer(input_scale),
    )
    if not library().qllm_linear(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for the activations of {rows} x {in_features}")
    return y
