"""Every operation of the quantized layers, and the choice of the kernel that runs it.

`reference` is the specification. A kernel has the reference's signature, says what it can do,
and gives a reason where it cannot. `select` decides once per layer; `--explain` prints the answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from qllm.ops import reference
from qllm.ops.cpu import delta, library, linear, steps, tuning
from qllm.ops.gpu import attention as gpu_attention
from qllm.ops.gpu import device as gpu
from qllm.ops.gpu import layout as gpu_layout
from qllm.ops.gpu import linear as gpu_linear
from qllm.ops.gpu import rows as gpu_rows
from qllm.ops.gpu import tuning as gpu_tuning
from qllm.ops.kernel import Choice, Kernel, Layout, Request

INTERPRETED = "TRITON_INTERPRET=1 asks for the GPU kernels"


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch._int_mm sums int8 products without saturation on this machine.

    Instructions that add pairs of products in 16 bits (AVX2's vpmaddubsw) saturate where both
    products are at an extreme, so rows of one value are tried, and rows that alternate; and one
    row alone, which may take another path.
    """
    corners = torch.tensor([-128, 127, -127, 1], dtype=torch.int8)
    constant = corners.repeat_interleave(64).view(4, 64)
    mixed = torch.stack([corners.roll(i).repeat(16) for i in range(4)])
    rows = torch.cat([constant, mixed])
    try:
        return all(
            torch.equal(reference.int_mm(x, rows), reference.int8_matmul(x, rows))
            for x in (rows, rows[1:2])
        )
    except RuntimeError:
        return False


def _int_mm_unsupported(request: Request) -> str | None:
    if request.device != "cpu":
        return f"its shape rules on {request.device} are not met by every batch"
    if request.in_features == 1:
        return "it misreads the strides of a single column"
    return None if _int_mm_is_exact() else "its self-test on this machine failed"


@cache
def _cpu_vendor() -> str:
    """ "GenuineIntel" and the like, "" where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else ""


def _onednn_unsupported(request: Request) -> str | None:
    if request.device != "cpu":
        return "it is for CPUs"
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return "the torch of this machine is built without it"
    if _cpu_vendor() in ("", "GenuineIntel"):
        return "MKL is as fast on this machine"
    return None


def _packed_unsupported(request: Request) -> str | None:
    if _interpreting(request):
        return INTERPRETED
    return linear.unsupported_reason(request.device, request.in_features, request.group_size)


def _int8_sums(
    unsupported_reason: Callable[[Request], str | None],
) -> Callable[[Request], str | None]:
    """The conditions of a kernel that sums products of int8 in int32, over all inputs."""

    def reason(request: Request) -> str | None:
        if request.in_features > reference.EXACT_INT32_TERMS:
            return f"int32 holds sums of no more than {reference.EXACT_INT32_TERMS} products"
        return unsupported_reason(request)

    return reason


def _cpu_unsupported(request: Request) -> str | None:
    return INTERPRETED if _interpreting(request) else library.unsupported_reason(request.device)


def _interpreting(request: Request) -> bool:
    return request.device == "cpu" and gpu.interpreting()


def _gpu_unsupported(request: Request) -> str | None:
    return gpu.unsupported_reason(request.device)


def _gpu_packed_unsupported(request: Request) -> str | None:
    reason = _gpu_unsupported(request)
    if reason is None and request.scheme == "offset":
        reason = gpu_linear.offsets_unsupported_reason(request.device)
    return reason


def _layout(module: ModuleType) -> Layout:
    """The layout that a module's `pack` makes, `unpack` undoes, and `look_up` reads rows of."""
    return Layout(
        lambda weight, asked: module.pack(weight, asked.bits, asked.group_size, asked.in_features),
        lambda weight, asked: module.unpack(
            weight, asked.bits, asked.group_size, asked.in_features, asked.out_features
        ),
        lambda index, weight, asked, dtype: module.look_up(
            index,
            weight,
            asked.bits,
            asked.group_size,
            asked.in_features,
            asked.out_features,
            dtype,
        ),
        lambda weight, asked: module.packed_nbytes(
            weight, asked.bits, asked.group_size, asked.in_features
        ),
    )


CPU_LAYOUT, GPU_LAYOUT = _layout(linear), _layout(gpu_layout)


# Ops that need no more than a device, besides those of the layers; and their kernels for GPUs.
SIMPLE = (
    *("embedding", "layer_norm", "rms_norm", "qk_norm", "activation", "gated_activation", "add"),
    *("scale", "scale_rows", "gather", "join", "wide_qk_norm", "route"),
    *("gate", "causal_conv", "delta_rule"),
    *("decode_attention", "prefill_attention", "layer_norm_int8", "rms_norm_int8"),
    *("differentiable_attention", "step_rounding", "descend_block"),
)
GPU_SIMPLE: dict[str, Callable[..., Any]] = {  # which return tensors, or `Int8Rows`
    "decode_attention": gpu_attention.decode_attention,
    "prefill_attention": gpu_attention.prefill_attention,
    "activation": gpu_rows.activation,
    "gated_activation": gpu_rows.gated_activation,
    "layer_norm_int8": gpu_rows.layer_norm_int8,
    "rms_norm_int8": gpu_rows.rms_norm_int8,
    "rms_norm": gpu_rows.rms_norm,
    "qk_norm": gpu_rows.qk_norm,
    "wide_qk_norm": gpu_rows.wide_qk_norm,
    "descend_block": gpu_tuning.descend_block,
}


def _simple(op: str) -> tuple[Kernel, ...]:
    """The kernels of an op that needs no more than a device."""
    kernels = [Kernel("reference", lambda: "plain torch", getattr(reference, op))]
    if op in GPU_SIMPLE:
        kernels.insert(0, Kernel("triton", gpu.about, GPU_SIMPLE[op], _gpu_unsupported))
    for module in (steps, delta, tuning):
        if hasattr(module, op):
            kernels.insert(0, Kernel("cpu", library.about, getattr(module, op), _cpu_unsupported))
    return tuple(kernels)


# Kernels of each op, the preferred one first; the last can do all.
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "dense_linear": (
        Kernel("cpu", library.about, linear.dense_linear, _cpu_unsupported),
        Kernel(
            "triton",
            gpu_linear.about_dense,
            gpu_linear.dense_linear,
            _gpu_unsupported,
        ),
        Kernel(
            "oneDNN",
            lambda: "dense product; MKL, which torch takes in float32, is slow on this CPU",
            reference.onednn_linear,
            _onednn_unsupported,
        ),
        Kernel("torch.linear", lambda: "dense product", reference.dense_linear),
    ),
    "weight_only_linear": (
        Kernel("cpu", linear.about, linear.weight_only_linear, _packed_unsupported, CPU_LAYOUT),
        Kernel(
            "triton",
            gpu_linear.about,
            gpu_linear.weight_only_linear,
            _gpu_packed_unsupported,
            GPU_LAYOUT,
        ),
        Kernel(
            "reference", lambda: "dequantize, then a dense product", reference.weight_only_linear
        ),
    ),
    "weight_only_linear_int8": (
        Kernel(
            "cpu",
            linear.about_int8,
            linear.weight_only_linear_int8,
            _packed_unsupported,
            CPU_LAYOUT,
        ),
        Kernel(
            "reference",
            lambda: "activations rounded to int8, then dequantize, and a dense product",
            reference.weight_only_linear_int8,
        ),
    ),
    "int8_linear": (
        Kernel(
            "cpu",
            linear.about_int8_weights,
            linear.int8_linear,
            _int8_sums(_packed_unsupported),
            CPU_LAYOUT,
        ),
        Kernel(
            "triton",
            gpu_linear.about_int8,
            gpu_linear.int8_linear,
            _int8_sums(_gpu_unsupported),
            takes_rows=True,
        ),
        Kernel(
            "torch._int_mm",
            lambda: "int8 x int8 -> int32 product, exact in its self-test",
            reference.int8_linear_by_int_mm,
            _int8_sums(_int_mm_unsupported),
        ),
        Kernel("reference", lambda: "int8 product in exact float32 sums", reference.int8_linear),
    ),
    **{op: _simple(op) for op in SIMPLE},
}


class _Mode(threading.local):
    """That of this thread."""

    differentiable = False


_mode = _Mode()


@contextmanager
def differentiable() -> Iterator[None]:
    """The ops between linear layers are such as gradients go through inside."""
    before, _mode.differentiable = _mode.differentiable, True
    try:
        yield
    finally:
        _mode.differentiable = before


def is_differentiable() -> bool:
    """Whether this thread is inside `differentiable`."""
    return _mode.differentiable


def on(device: str) -> SimpleNamespace:
    """The ops between linear layers, by name, as the best kernels of a device have them.

    Besides, `add_norm` has by a norm's name what adds in front of it; empty where that gains
    nothing.
    """
    return differentiable_on(device) if _mode.differentiable else kernels_on(device)


@cache
def differentiable_on(device: str) -> SimpleNamespace:
    """`on` inside `differentiable`: plain torch, but for what has a way back of its own."""
    own = {
        "prefill_attention": kernels_on(device).differentiable_attention,
        "causal_conv": reference.differentiable_conv,
        "delta_rule": reference.differentiable_delta_rule,
    }
    found = {op: getattr(reference, op) for op in SIMPLE}
    return SimpleNamespace(**found | own, add_norm={})


@cache
def kernels_on(device: str) -> SimpleNamespace:
    """`on` outside `differentiable`."""
    request = Request(0, 0, 16, -1, "asym", device)
    found = {op: select(op, request).kernel.run for op in SIMPLE}
    return SimpleNamespace(
        **found, add_norm=gpu_rows.ADD_NORM if _gpu_unsupported(request) is None else {}
    )


def compiles(device: str) -> bool:
    """Whether kernels of a device, by its type, are compiled as layers come to need them."""
    return device == "cuda" and gpu.unsupported_reason(device) is None


def prepare(device: str) -> None:
    """Compile what a device's kernels need, in front of work that shows how far it is."""
    on(device)


def keep_freed_memory(device: str, *, workers: bool = False) -> None:
    """Keep a device's memory that is freed, behind loading and in front of work.

    Args:
        workers: of threads with parts of the work to themselves.
    """
    if device == "cpu":
        library.keep_freed_memory(workers=workers)


def select(op: str, request: Request) -> Choice:
    """The first kernel of `op` that can serve the request, with the reason."""
    refusals: list[str] = []
    for kernel in KERNELS[op]:
        reason = kernel.unsupported_reason(request)
        if reason is None:
            return Choice(kernel, "; ".join([kernel.about(), *refusals]))
        refusals.append(f"not {kernel.name}: {reason}")
    raise AssertionError(f"no kernel of {op} takes {request}")


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (M, K) @ b (N, K)^T of one type, by the library that is the faster one on this machine.

    What a row becomes may depend on the rows beside it, unlike with the ops.
    """
    request = Request(a.shape[1], b.shape[0], 16, -1, "asym", a.device.type)
    if a.dtype != torch.float32 or _onednn_unsupported(request) is not None:
        return reference.dense_linear(a, b, None)
    # With rows that are apart in memory it takes a thousand times as long.
    apart = not (b.is_contiguous() or b.t().is_contiguous())
    return reference.onednn_linear(a.contiguous(), b.contiguous() if apart else b, None)
