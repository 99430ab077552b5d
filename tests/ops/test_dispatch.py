"""Every kernel of every op against numpy, and how one is chosen. Walks the registry."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from qllm import ops
from qllm.config import SCHEMES
from qllm.ops import KERNELS, Kernel, Request, reference, select
from qllm.quant.packing import BITS, pack

pytestmark = pytest.mark.usefixtures("one_thread")

KERNEL_CASES = [(op, kernel.name) for op, kernels in KERNELS.items() for kernel in kernels]
SHAPES = ((64, 32), (67, 13), (1, 1), (256, 40))  # (K, N)
ROWS = (1, 5, 33)


def kernel_named(op: str, name: str) -> Kernel:
    return next(kernel for kernel in KERNELS[op] if kernel.name == name)


def requests(op: str) -> list[Request]:
    """What layers may ask of an op on a CPU."""
    if op == "dense_linear":
        return [Request(*shape, 16, 128, "asym", "cpu") for shape in SHAPES]
    if op == "int8_matmul":
        return [Request(*shape, 8, -1, "sym", "cpu") for shape in SHAPES]
    return [
        Request(*shape, bits, group_size, scheme, "cpu")
        for shape in SHAPES
        for bits in BITS
        for group_size in (-1, 7, 32, 128)
        for scheme in SCHEMES
    ]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def product(x: torch.Tensor, weight: np.ndarray, bias: torch.Tensor) -> tuple[np.ndarray, float]:
    """x W^T + b in float64, and the largest sum of absolute values in it."""
    x, bias = x.double().numpy(), bias.double().numpy()
    size = np.abs(x) @ np.abs(weight).T + np.abs(bias)
    return x @ weight.T + bias, size.max()


def dense_example(request: Request, rows: int, dtype: torch.dtype):
    x = normal(rows, request.in_features).to(dtype)
    weight = normal(request.out_features, request.in_features).to(dtype)
    bias = normal(request.out_features).to(dtype)
    return (x, weight, bias), *product(x, weight.double().numpy(), bias)


def weight_only_example(request: Request, rows: int, dtype: torch.dtype):
    columns, outputs, bits = request.in_features, request.out_features, request.bits
    step = columns if request.group_size == -1 else request.group_size
    random = np.random.default_rng(columns * bits)
    q = random.integers(0, 2**bits, (outputs, columns), dtype=np.uint8)
    zeros = random.integers(0, 2**bits, (outputs, -(-columns // step)), dtype=np.uint8)
    scales = random.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    index = np.arange(columns) // step
    symmetric = request.scheme == "sym"
    zero = 2 ** (bits - 1) if symmetric else zeros[:, index].astype(np.int64)
    matrix = (q.astype(np.int64) - zero) * scales.astype(np.float64)[:, index]
    x, bias = normal(rows, columns).to(dtype), normal(outputs).to(dtype)
    qzeros = torch.from_numpy(zeros)
    arguments = (
        x,
        pack(torch.from_numpy(q), bits),
        torch.from_numpy(scales),
        qzeros.new_empty(0) if symmetric else qzeros,
        bias,
        bits,
        request.group_size,
    )
    return arguments, *product(x, matrix, bias)


def int8_example(request: Request, rows: int, dtype: torch.dtype):
    random = np.random.default_rng(rows)
    x = random.integers(-128, 128, (rows, request.in_features), dtype=np.int8)
    weight = random.integers(-128, 128, (request.out_features, request.in_features), dtype=np.int8)
    arguments = (torch.from_numpy(x), torch.from_numpy(weight))
    return arguments, x.astype(np.int64) @ weight.astype(np.int64).T, 0.0


# Of each op, for a request: arguments, the exact result, and the size of what it sums, which is
# what rounding errors are in proportion to. An op that is not here fails the walk.
EXAMPLES = {
    "dense_linear": dense_example,
    "weight_only_linear": weight_only_example,
    "int8_matmul": int8_example,
}
EXACT = ("int8_matmul",)


def test_every_op_has_an_example():
    assert EXAMPLES.keys() == KERNELS.keys()


@pytest.mark.parametrize(("op", "name"), KERNEL_CASES)
def test_kernel_computes_the_op(op, name):
    kernel = kernel_named(op, name)
    specification = getattr(reference, op)
    reasons = {request: kernel.why_not(request) for request in requests(op)}
    served = [request for request, reason in reasons.items() if reason is None]
    # A kernel may refuse everything only because of the machine.
    assert served or any("this machine" in reason for reason in reasons.values())
    for request in served:
        for rows in ROWS:
            for dtype in (torch.float32,) if op in EXACT else (torch.float32, torch.bfloat16):
                arguments, exact, size = EXAMPLES[op](request, rows, dtype)
                got = kernel.run(*arguments)
                assert got.shape == exact.shape
                if op in EXACT:
                    assert np.array_equal(got.numpy(), exact)
                    continue
                assert got.dtype == dtype
                error = np.abs(got.double().numpy() - exact).max()
                # The reference in the same type may not be far off, nor the kernel farther.
                allowed = np.abs(specification(*arguments).double().numpy() - exact).max()
                size *= torch.finfo(dtype).eps
                assert allowed <= 2 * size
                assert error <= 2 * allowed + size / 16


@pytest.mark.parametrize(("op", "name"), KERNEL_CASES)
def test_kernel_has_the_signature_of_its_op(op, name):
    expected = inspect.signature(getattr(reference, op)).parameters
    assert list(inspect.signature(kernel_named(op, name).run).parameters) == list(expected)


@pytest.mark.parametrize(("op", "name"), KERNEL_CASES)
def test_kernel_says_what_it_is(op, name):
    about = kernel_named(op, name).about
    assert about and "\n" not in about


@pytest.mark.parametrize("op", KERNELS)
def test_names_are_unique_and_the_last_kernel_takes_all(op):
    names = [kernel.name for kernel in KERNELS[op]]
    assert len(set(names)) == len(names)
    last = KERNELS[op][-1]
    assert last.run is getattr(reference, op)
    for request in requests(op):
        for device in ("cpu", "cuda", "meta"):
            assert last.why_not(replace(request, device=device)) is None


@pytest.mark.parametrize("op", KERNELS)
def test_select_takes_the_first_that_can(op):
    for request in requests(op):
        for device in ("cpu", "cuda", "meta"):
            choice = select(op, replace(request, device=device))
            can = [k for k in KERNELS[op] if k.why_not(replace(request, device=device)) is None]
            assert choice.kernel is can[0]


def test_a_refusal_is_in_the_reason(monkeypatch):
    def run() -> None: ...

    def why_not(request: Request) -> str | None:
        return "odd size" if request.in_features % 2 else None

    picky = Kernel("picky", "for even sizes", run, why_not)
    kernels = (picky, Kernel("reference", "for all", run))
    monkeypatch.setitem(KERNELS, "int8_matmul", kernels)
    even, odd = (Request(size, 4, 8, -1, "sym", "cpu") for size in (2, 3))
    assert select("int8_matmul", even) == ops.Choice(picky, "for even sizes")
    choice = select("int8_matmul", odd)
    assert choice.kernel.name == "reference"
    assert choice.reason == "for all; not picky: odd size"


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
@pytest.mark.usefixtures("fresh_self_test")
def test_an_int8_kernel_that_is_not_exact_is_not_chosen(monkeypatch, broken):
    monkeypatch.setattr(reference, "int_mm", broken)
    choice = select("int8_linear", Request(64, 64, 8, -1, "sym", "cpu"))
    assert choice.kernel.run is reference.int8_matmul
    assert "not torch._int_mm: its self-test on this machine failed" in choice.reason


def test_int8_is_exact_where_torch_s_kernel_saturates():
    # oneDNN held to AVX2 runs vpmaddubsw, as it does on a machine without VNNI.
    program = """
import torch
from qllm.ops import Request, reference, select
run = select("int8_linear", Request(64, 64, 8, -1, "sym", "cpu")).kernel.run
x = torch.full((3, 64), 127, dtype=torch.int8)
print(run(x, x).unique().tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"[{127 * 127 * 64}]\n", done.stderr


@pytest.mark.usefixtures("fresh_self_test")
def test_an_int8_kernel_that_is_exact_is_chosen(monkeypatch):
    monkeypatch.setattr(reference, "int_mm", reference.int8_matmul)
    choice = select("int8_linear", Request(64, 64, 8, -1, "sym", "cpu"))
    assert choice.kernel.name == "torch._int_mm"


def test_int_mm_is_not_for_one_column():
    # torch 2.13 returns memory it never wrote to for a matrix of one column.
    choice = select("int8_linear", Request(1, 64, 8, -1, "sym", "cpu"))
    assert choice.kernel.run is reference.int8_matmul
    assert "single column" in choice.reason


def test_int_mm_is_not_for_cuda():
    choice = select("int8_linear", Request(64, 64, 8, -1, "sym", "cuda"))
    assert choice.kernel.run is reference.int8_matmul
    assert "not torch._int_mm" in choice.reason and "cuda" in choice.reason
