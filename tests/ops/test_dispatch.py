"""Every kernel of every op against numpy, and how one is chosen. Walks the registry."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import exact
import numpy as np
import pytest
import torch
from conftest import ROOT
from op_examples import EXACT, EXAMPLES, IN_FLOAT32, TO_INT8, one_tensor, requests

from qllm import ops
from qllm.ops import KERNELS, Kernel, Request, reference, select
from qllm.ops.cpu import build
from qllm.ops.cpu import library as native
from qllm.quant.packing import PackedWeight, pack

pytestmark = pytest.mark.usefixtures("one_thread")

KERNEL_CASES = [(op, kernel.name) for op, kernels in KERNELS.items() for kernel in kernels]
ROWS = (1, 5, 33)
# Of sums that are rounded, and of those that are exact.
DTYPES = (
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16, torch.bfloat16),
)
# Of so many cases one is taken: of the interpreter's, which is slow, of the reference's, where all
# see the same code, and of products of weights, which have the most and other tests of their own.
# None of these numbers is a factor of an axis.
STEPS = {"interpreter": (13, 61), "reference": (5, 17), "cpu": (1, 5)}
# Of a unit in the last place of the largest sum: what a kernel may add to the reference's error.
# Scales of activations that are no powers of two round every product.
# A recurrence rounds again and again. Attention's weights are exponentials of rounded scores: what
# the reference's error is depends on whose matrix product the machine's torch takes (a fifth of a
# unit as a rule, and a twentieth where that was lucky), while the kernel's is the same everywhere.
SLACK = {"weight_only_linear_int8": 1 / 2, "delta_rule": 1, "prefill_attention": 1 / 8}


def kernel_named(op: str, name: str) -> Kernel:
    return next(kernel for kernel in KERNELS[op] if kernel.name == name)


def stored_weight(arguments: dict) -> PackedWeight:
    """The quantized weight in an op's arguments, as checkpoints have it."""
    q, scales = arguments["qweight"], arguments["scales"]
    if q.dtype != torch.int8:
        return PackedWeight(q, scales, arguments["qzeros"])
    rows = pack((q.int() + 128).to(torch.uint8), 8)  # the symmetric grid, whose zero is 128
    return PackedWeight(rows, scales[:, None], rows.new_empty(0))


def laid_out(kernel: Kernel, request: Request, arguments: dict) -> dict:
    """An op's arguments as a kernel takes them."""
    if kernel.layout is None:
        return arguments
    packed = kernel.layout.pack(stored_weight(arguments), request)._asdict()
    return {name: packed.get(name, value) for name, value in arguments.items()}


def test_every_op_has_an_example():
    assert EXAMPLES.keys() == KERNELS.keys()


def served_requests(op: str, kernel: Kernel, device: str) -> list[Request]:
    """Those that a kernel can do; it may refuse everything only because of the machine."""
    asked = [replace(request, device=device) for request in requests(op)]
    reasons = {request: kernel.unsupported_reason(request) for request in asked}
    served = [request for request, reason in reasons.items() if reason is None]
    assert served or any("this machine" in reason for reason in reasons.values())
    return served


@pytest.fixture
def device(name, request):
    """Where a kernel can run."""
    return request.getfixturevalue("gpu") if name == "triton" else "cpu"


def moved(arguments: dict, device: str) -> dict:
    """Copies on a device: attention writes to the cache that it is given."""
    if device == "cpu":
        return copy.deepcopy(arguments)
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), arguments)


@pytest.mark.parametrize(("op", "name"), KERNEL_CASES)
def test_kernel_computes_the_op(op, name, device):
    kernel = kernel_named(op, name)
    specification = getattr(reference, op)
    served = served_requests(op, kernel, device)
    cases = itertools.product(served, EXAMPLES[op], DTYPES[op in EXACT], ROWS)
    where = "interpreter" if name == "triton" and device == "cpu" else name
    step = STEPS.get(where, (1, 1))[op.startswith("weight_only_linear")]
    for request, example, dtype, rows in itertools.islice(cases, 0, None, step):
        arguments, want, size = example(request, rows, dtype)
        got = kernel.run(**laid_out(kernel, request, moved(arguments, device)))
        if op in TO_INT8:
            assert_int8(got, want, size, dtype)
            continue
        got = one_tensor(op, got, arguments).cpu()
        assert got.shape == want.shape
        assert got.dtype == (torch.float32 if op in IN_FLOAT32 else dtype)
        error = np.abs(exact.numpy(got) - want).max()
        if op in EXACT:
            assert error == 0
            continue
        # The reference in the same type may not be far off, nor the kernel farther.
        found = one_tensor(op, specification(**arguments), arguments)
        allowed = np.abs(exact.numpy(found) - want).max()
        size *= torch.finfo(dtype).eps
        assert allowed <= 2 * size
        slack = SLACK.get(op, 1 / 16)
        if name == "triton" and dtype == torch.float32:
            slack = 1  # summed in the order of its inputs, by whatever multiplies numpy's matrices
        assert error <= 2 * allowed + size * slack


def assert_int8(got: reference.Int8Rows, want: np.ndarray, size: float, dtype: torch.dtype) -> None:
    """Rows as int8 are at most half a step from what they stand for, and a rounding of it."""
    assert got.values.dtype == torch.int8 and got.dtype == dtype
    assert got.values.shape == want.shape
    scales = exact.numpy(got.scales.cpu())
    error = np.abs(exact.numpy(got.values.cpu()) * scales - want)
    assert (error <= scales / 2 + 2 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize(("op", "name"), KERNEL_CASES)
def test_a_layout_has_a_way_back(op, name, device):
    kernel = kernel_named(op, name)
    if kernel.layout is None:
        return
    for request in served_requests(op, kernel, device):
        arguments, *_ = EXAMPLES[op][0](request, 1, torch.float32)
        stored = stored_weight(moved(arguments, device))
        back = kernel.layout.unpack(kernel.layout.pack(stored, request), request)
        for got, expected in zip(back[:3], stored[:3], strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize(("op", "name"), KERNEL_CASES)
def test_kernel_has_the_signature_of_its_op(op, name):
    expected = inspect.signature(getattr(reference, op)).parameters
    assert list(inspect.signature(kernel_named(op, name).run).parameters) == list(expected)


@pytest.mark.parametrize(("op", "name"), KERNEL_CASES)
def test_kernel_says_what_it_is(op, name):
    kernel = kernel_named(op, name)
    if any(kernel.unsupported_reason(request) is None for request in requests(op)):
        about = kernel.about()
        assert about and "\n" not in about


@pytest.mark.parametrize("op", KERNELS)
def test_names_are_unique_and_the_last_kernel_takes_all(op):
    names = [kernel.name for kernel in KERNELS[op]]
    assert len(set(names)) == len(names)
    last = KERNELS[op][-1]
    assert last.run is getattr(reference, op)
    for request in requests(op):
        for device in ("cpu", "cuda", "meta"):
            assert last.unsupported_reason(replace(request, device=device)) is None


@pytest.mark.parametrize("op", KERNELS)
def test_select_takes_the_first_that_can(op):
    for request in requests(op):
        for device in ("cpu", "cuda", "meta"):
            choice = select(op, replace(request, device=device))
            can = [
                k
                for k in KERNELS[op]
                if k.unsupported_reason(replace(request, device=device)) is None
            ]
            assert choice.kernel is can[0]


def test_a_refusal_is_in_the_reason(monkeypatch):
    def run() -> None: ...

    def unsupported_reason(request: Request) -> str | None:
        return "odd size" if request.in_features % 2 else None

    picky = Kernel("picky", lambda: "for even sizes", run, unsupported_reason)
    kernels = (picky, Kernel("reference", lambda: "for all", run))
    monkeypatch.setitem(KERNELS, "int8_linear", kernels)
    even, odd = (Request(size, 4, 8, -1, "sym", "cpu") for size in (2, 3))
    assert select("int8_linear", even) == ops.Choice(picky, "for even sizes")
    choice = select("int8_linear", odd)
    assert choice.kernel.name == "reference"
    assert choice.reason == "for all; not picky: odd size"


@pytest.fixture
def without_cpu_kernels(monkeypatch):
    """As on a machine without a compiler."""

    def load(omitted: frozenset[str]) -> None:
        raise build.Unavailable("none today")

    def forget() -> None:
        native.library.cache_clear()
        native.unavailable.cache_clear()

    forget()
    monkeypatch.setattr(build, "load", load)
    yield
    forget()


@pytest.fixture
def fresh_self_test():
    """The self-test runs anew, and its answer is forgotten after the test."""
    ops._int_mm_is_exact.cache_clear()
    yield
    ops._int_mm_is_exact.cache_clear()


def saturating(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """vpmaddubsw: unsigned times signed, the sum of two products cut off at 16 bits."""
    products = (x[:, None, :].int() + 128) * weight[None].int()
    sums = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1)
    return (sums - 128 * weight.int().sum(-1)).int()


def saturating_swapped(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same with the weight as the unsigned side."""
    return saturating(weight, x).t()


def wrong_for_one_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A kernel whose path for a single row saturates."""
    return (saturating if len(x) == 1 else reference.int8_matmul)(x, weight)


def missing(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no int8 kernel on this CPU")


@pytest.mark.parametrize("broken", [saturating, saturating_swapped, wrong_for_one_row, missing])
@pytest.mark.usefixtures("fresh_self_test", "without_cpu_kernels")
def test_an_int8_kernel_that_is_not_exact_is_not_chosen(monkeypatch, broken):
    monkeypatch.setattr(reference, "int_mm", broken)
    choice = select("int8_linear", Request(64, 64, 8, -1, "sym", "cpu"))
    assert choice.kernel.run is reference.int8_linear
    assert "not torch._int_mm: its self-test on this machine failed" in choice.reason


def test_int8_is_exact_where_torch_s_kernel_saturates():
    # oneDNN held to AVX2 runs vpmaddubsw, as it does on a machine without VNNI.
    program = """
import torch
from qllm.ops import KERNELS, Request
request = Request(64, 64, 8, -1, "sym", "cpu")
weight, one = torch.full((3, 64), 127, dtype=torch.int8), torch.ones(3)
for kernel in KERNELS["int8_linear"]:
    if kernel.layout is None and kernel.unsupported_reason(request) is None:
        y = kernel.run(weight.float(), weight, one, None, one[0], 3)
        print(y.unique().tolist())
        break
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"[{127 * 127 * 64}.0]\n", done.stderr


@pytest.mark.usefixtures("fresh_self_test", "without_cpu_kernels")
def test_an_int8_kernel_that_is_exact_is_chosen(monkeypatch):
    monkeypatch.setattr(reference, "int_mm", reference.int8_matmul)
    choice = select("int8_linear", Request(64, 64, 8, -1, "sym", "cpu"))
    assert choice.kernel.name == "torch._int_mm"


@pytest.mark.usefixtures("without_cpu_kernels")
def test_int_mm_is_not_for_one_column():
    # torch 2.13 returns memory it never wrote to for a matrix of one column.
    choice = select("int8_linear", Request(1, 64, 8, -1, "sym", "cpu"))
    assert choice.kernel.run is reference.int8_linear
    assert "single column" in choice.reason


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sums_that_int32_does_not_hold_are_the_reference_s(device):
    inputs = 1 << 17
    choice = select("int8_linear", Request(inputs, 2, 8, -1, "sym", device))
    assert choice.kernel.run is reference.int8_linear
    for name in ("cpu", "triton", "torch._int_mm"):
        reason = f"not {name}: int32 holds sums of no more than {inputs - 1} products"
        assert reason in choice.reason
    fewer = select("int8_linear", Request(inputs - 1, 2, 8, -1, "sym", device))
    assert "int32 holds" not in fewer.reason
    x, weight = torch.full((3, inputs), -128.0), torch.full((2, inputs), -128, dtype=torch.int8)
    y = choice.kernel.run(x, weight, torch.ones(2), None, torch.tensor(1.0), 2)
    assert (y == 2.0**31).all()


def test_int_mm_is_not_for_cuda():
    (int_mm,) = (kernel for kernel in KERNELS["int8_linear"] if kernel.name == "torch._int_mm")
    reason = int_mm.unsupported_reason(Request(64, 64, 8, -1, "sym", "cuda"))
    assert reason and "cuda" in reason.lower()


@pytest.mark.parametrize("vendor", ["AuthenticAMD", "GenuineIntel"])
def test_products_of_matrices_however_they_lie(vendor, monkeypatch):
    monkeypatch.setattr(ops, "_cpu_vendor", lambda: vendor)
    draw = np.random.default_rng(0)
    a, b = (torch.from_numpy(draw.standard_normal((n, 40))).float() for n in (33, 26))
    wanted = a.double().numpy()[:, 3:23] @ b.double().numpy()[:, 3:23].T
    for x, y in itertools.product((a, a.t().contiguous().t()), (b, b.t().contiguous().t())):
        parts = x[:, 3:23], y[:, 3:23]
        for given in (parts, (parts[0].contiguous(), parts[1].contiguous())):
            np.testing.assert_allclose(ops.multiply(*given).numpy(), wanted, rtol=0, atol=2e-5)
