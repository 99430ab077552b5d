"""Weights, and inputs to judge them by whose channels go together, as layers have them."""

from __future__ import annotations

import torch

from qllm.ops.reference import dequantize
from qllm.quant.packing import PackedWeight

# 150 is no multiple of the groups or blocks; 200 rows are enough for chance not to matter.
ROWS, COLUMNS = 200, 150


def drawn(rows: int = ROWS, columns: int = COLUMNS, tokens: int = 600, seed: int = 0):
    """A weight (N, K), and the mean of x x^T over inputs as layers have them: some channels are
    much larger than others, and all are correlated."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.randn(columns, generator=generator).exp()
    x = torch.randn(tokens, columns, generator=generator) @ (mixing + torch.eye(columns)) * sizes
    return weight, x.t() @ x / tokens


def restored(packed: PackedWeight, bits: int, group_size: int, columns: int) -> torch.Tensor:
    """The matrix that integers stand for, its columns in their places: float32 (N, K)."""
    *tensors, perm = packed
    matrix = dequantize(*tensors, bits, group_size, columns, torch.float32)
    if perm is None:
        return matrix
    back = torch.empty_like(matrix)
    back[:, perm] = matrix
    return back
