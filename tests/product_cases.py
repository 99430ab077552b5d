"""Shapes and sizes that tests of products share."""

from __future__ import annotations

import pytest
import torch
from covering import each, slow_but
from cpu_paths import DTYPES, Weight
from torch import Tensor

from qllm.quant.packing import BITS

GROUPS = (-1, 16, 20, 32, 100, 128)
SHAPES = ((1, 1), (13, 67), (40, 256), (64, 100), (70, 33), (97, 300))  # (N, K)
ROWS = (1, 2, 3, 4, 5, 7, 13, 33, 200)
each_type_and_all_bits = pytest.mark.parametrize(
    ("bits", "dtype"), slow_but(each(BITS, DTYPES), BITS, DTYPES), ids=str
)


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def assert_close(weight: Weight, x: Tensor, bias: Tensor | None, got: Tensor) -> None:
    """The error is at most twice that of the reference in the same type."""
    assert got.dtype == x.dtype and got.shape == (len(x), len(weight.matrix))
    exact = weight.exact(x, bias)
    error = rms(got.double() - exact)
    allowed = 2 * rms(weight.reference(x, bias).double() - exact)
    size = torch.finfo(x.dtype).eps * rms(weight.size(x, bias))
    # The reference may be exact by chance, the more so the fewer numbers it finds.
    allowed += size / 16 if got.numel() > 64 else size
    assert error <= allowed, f"{error / size:.3} of an ulp, {allowed / size:.3} allowed"
