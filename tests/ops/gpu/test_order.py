"""What orders threads, copies and products in CUDA C++ is left out, one call after the other.

The emulations have to find each: emulated_order.h says how.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import gpu_kernels
import pytest
import torch
from cpu_paths import normal, random_weight
from torch import Tensor

from qllm.ops import phase, reference
from qllm.ops.gpu import cuda, decode, decode_int8, hopper, hopper_int8

KERNELS = hopper  # which `own_hopper` asks
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it is for the emulations")
ORDERS = re.compile(
    r"(?<!DEVICE void )\b((?:init|publish)_barriers?|arrive(?:_expecting|_in_cluster)?"
    r"|(?:warp_|consumers_|cluster_)?barrier(?:_relaxed)?|(?:begin|commit)_products"
    r"|wait(?:_for_\w+(?:<\d>)?)?|let_next_begin|(?:give_up|take)_registers)\("
)


class Call(NamedTuple):
    """Of a function that orders something, where it is."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}-{self.name}"


def calls(name: str, *parts: str) -> list[Call]:
    """Those in a kernel and the parts of its source."""
    return [
        Call(file, number, match[1])
        for file in (*parts, f"{name}.cu")
        for number, line in enumerate((cuda.SOURCE / file).read_text("utf-8").splitlines(), 1)
        for match in ORDERS.finditer(line.partition("//")[0])
    ]


def prompt(bits: int, group: int, tile: hopper.Tile) -> Tensor:
    weight, x = random_weight((70, 1100), bits, group), normal(66, 1100, dtype=torch.bfloat16)
    return gpu_kernels.multiply(weight, x, None, "cpu", hopper.weight_only_linear, tile=tile)


def step(rows: int) -> Tensor:
    weight, x = random_weight((40, 1160), 4, 128), normal(rows, 1160, dtype=torch.bfloat16)
    with phase.decode():
        return gpu_kernels.multiply(weight, x, None, "cpu", decode.weight_only_linear)


def int8(product: Callable[..., Tensor], inputs: int, **cut: hopper_int8.Cut) -> Tensor:
    rows = reference.quantize_rows(normal(13, inputs, dtype=torch.bfloat16), None)
    q = torch.arange(70 * inputs).mul(7).view(70, inputs).to(torch.int8)
    with phase.decode():
        return product(rows, q, torch.ones(70), None, **cut)


@cache
def right(product: Callable[[], Tensor]) -> Tensor:
    return product()


def check_that_it_is_missed(
    library: ctypes.CDLL, call: Call, *products: Callable[[], Tensor]
) -> None:
    """A product fails, or finds something else, where a call is left out."""
    for product in products:
        wanted = right(product)
        library.leave_out(call.file.encode(), call.line)
        try:
            found = product()
        except RuntimeError as error:
            assert "CUDA error 719" in str(error)
            return
        finally:
            library.leave_out(b"", 0)
        if not torch.equal(found, wanted):
            return
    pytest.fail(f"nothing misses {call}")


@pytest.mark.parametrize("call", calls(hopper.SOURCE[0], *hopper.SOURCE[2:]), ids=str)
def test_prompts(call, own_hopper, monkeypatch):
    """Stages are few, so that they are used again, and there are several parts."""
    monkeypatch.setattr(hopper, "MAX_STAGES", 2)
    monkeypatch.setattr(hopper, "MAX_W_STAGES", 2)
    monkeypatch.setattr(hopper, "parts_of", lambda *weight: 2)
    check_that_it_is_missed(own_hopper, call, *PROMPTS)


PROMPTS = (
    partial(prompt, 4, 128, hopper.Tile(64, 64)),
    partial(prompt, 8, 32, hopper.Tile(256, 128)),
)


@pytest.mark.parametrize("call", calls(hopper_int8.SOURCE[0], *hopper_int8.SOURCE[2:]), ids=str)
def test_int8_prompts(call, own_hopper, monkeypatch):
    monkeypatch.setattr(hopper_int8, "MAX_STAGES", 2)
    check_that_it_is_missed(own_hopper, call, *INT8_PROMPTS)


INT8_PROMPTS = tuple(
    partial(int8, hopper_int8.int8_linear, 1040, cut=hopper_int8.Cut(*tile, 3))
    for tile in ((64, 128), (128, 64))
)


@pytest.mark.parametrize("call", calls("decode"), ids=str)
def test_steps(call, own_gpu, monkeypatch):
    cuts = {8: cuda.Cut(4, 2, 1, 1), 16: cuda.Cut(8, 1, 2, 2, parts=2, x_ahead=True)}
    monkeypatch.setattr(cuda, "cut", lambda kind, architecture, rows, *weight: cuts[rows])
    check_that_it_is_missed(own_gpu, call, *STEPS)


STEPS = tuple(partial(step, rows) for rows in (8, 16))


@pytest.mark.parametrize("call", calls("decode_int8"), ids=str)
def test_int8_steps(call, own_gpu, monkeypatch):
    monkeypatch.setattr(cuda, "cut", lambda *asked: cuda.Cut(4, 1, 2, 1))
    check_that_it_is_missed(own_gpu, call, INT8_STEP)


INT8_STEP = partial(int8, decode_int8.int8_linear, 400)
