"""Products with packed weights that self-tests make on a GPU, and what they are to find."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qllm.ops import reference
from qllm.ops.gpu import layout
from qllm.quant.packing import PackedWeight
from qllm.quant.packing import pack as pack_rows


class PackedProduct(NamedTuple):
    """Rows, on the CPU, and a weight, on a device.

    Attributes:
        exact: rows (M, K) whose sums are exact, so that there is but one result in any order.
        wanted: what the reference finds of these, (M, N).
        drawn: rows (M, K) whose sums depend on the order.
        weight: what follows the rows among the arguments of `weight_only_linear`.
    """

    exact: Tensor
    wanted: Tensor
    drawn: Tensor
    weight: tuple[Any, ...]


def packed_product(
    device: torch.device,
    shape: tuple[int, int],
    rows: int,
    *,
    bits: int = 4,
    group_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    scales_dtype: torch.dtype = torch.float16,
    offsets: bool = False,
) -> PackedProduct:
    """A product with a weight of some shape (N, K), with offsets in place of zeros or not."""
    (outputs, inputs), draw = shape, torch.Generator().manual_seed(0)
    index = torch.arange(outputs * -(-inputs // group_size)).view(outputs, -1)
    values = torch.randint(0, 1 << bits, shape, generator=draw).to(torch.uint8)
    scales = torch.tensor([0.25, 0.5, 1.0])[index % 3].to(scales_dtype)
    zeros = (index % 16 / -4).to(scales_dtype) if offsets else index.to(torch.uint8) % 8
    stored = PackedWeight(pack_rows(values, bits), scales, zeros)
    exact = torch.arange(rows * inputs).view(rows, inputs).remainder(5).sub(2)
    options = (outputs, bits, group_size)
    wanted = reference.weight_only_linear(exact.float(), *stored[:3], None, *options)
    there = PackedWeight(*(tensor.to(device) for tensor in stored[:3]))
    weight = (*layout.pack(there, bits, group_size, inputs)[:3], None, *options)
    drawn = torch.randn(rows, inputs, generator=draw)
    return PackedProduct(exact.to(dtype), wanted.to(dtype), drawn.to(dtype), weight)
