"""Round-to-nearest quantization, group by group: the arithmetic every other algorithm shares.

For a group w at b bits:

- asymmetric: lo = min(0, min w), hi = max(0, max w), scale = (hi - lo) / (2^b - 1),
  zero = round(-lo / scale)
- symmetric: scale = 2 max|w| / (2^b - 1), zero = 2^(b-1)
- q = clamp(round(w / scale) + zero, 0, 2^b - 1), and back (q - zero) * scale
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.quant.packing import PackedWeight, pack, packed_size

# Rows are quantized in pieces of about this many weights: the float32 temporaries stay in cache,
# and small beside the matrix.
CHUNK_ELEMENTS = 1 << 20

# float16 has subnormal numbers in steps of 2^-24: a smaller scale would be off by up to 1 in 256,
# which at 8 bits is a whole step at the ends of the range.
SMALLEST_HALF_SCALE = 2.0**-17


def quantize_rtn(weight: Tensor, bits: int, group_size: int, scheme: str) -> PackedWeight:
    """Quantize a matrix to nearest.

    Args:
        weight: floating point (N, K), finite: N output channels of K input channels.
        bits: 1 to 8.
        group_size: input channels per group, -1 for K; a last, shorter group is one of its own.
        scheme: "sym" or "asym".
    """
    rows, columns = weight.shape
    group = columns if group_size == -1 else min(group_size, columns)
    scales = torch.empty(rows, -(-columns // group), dtype=torch.float32, device=weight.device)
    lows = torch.empty_like(scales)
    step = max(1, CHUNK_ELEMENTS // columns)
    pieces = [slice(start, start + step) for start in range(0, rows, step)]
    for piece in pieces:
        scales[piece], lows[piece] = group_range(_grouped(weight[piece], group), bits, scheme)
    scales = store_scales(scales)  # one decision for the matrix: its scales have one type
    zeros = zero_points(lows, scales, bits, scheme)
    packed = weight.new_empty(rows, packed_size(columns, bits), dtype=torch.uint8)
    for piece in pieces:
        groups = _grouped(weight[piece], group)
        integers = round_to_grid(groups, scales[piece], zeros[piece], bits)
        packed[piece] = pack(integers.flatten(1)[:, :columns], bits)
    return PackedWeight(packed, scales, zeros if scheme == "asym" else zeros.new_empty(0))


def group_range(groups: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Scales and lower ends of groups: (N, G, g) to two float32 (N, G)."""
    low, high = groups.aminmax(dim=-1)
    low, high = low.float(), high.float()
    if scheme == "sym":
        scale = torch.maximum(-low, high) * 2 / (2**bits - 1)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high - low) / (2**bits - 1)
    return torch.where(scale == 0, 1.0, scale), low


def store_scales(scales: Tensor) -> Tensor:
    """Scales in the type they are stored in: float16, unless one over- or underflows there."""
    half = scales.to(torch.float16)
    fits = half.isfinite().all() and (half >= SMALLEST_HALF_SCALE).all()
    return half if fits else scales


def zero_points(lows: Tensor, scales: Tensor, bits: int, scheme: str) -> Tensor:
    """Zero points of groups with lower ends `lows` and scales as stored, (N, G): uint8 (N, G)."""
    if scheme == "sym":
        return torch.full_like(lows, 2 ** (bits - 1), dtype=torch.uint8)
    return torch.round(-lows / scales.float()).clamp_(0, 2**bits - 1).to(torch.uint8)


def round_to_grid(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """q of groups (N, G, g), given scales and zeros (N, G): uint8 (N, G, g)."""
    q = torch.round(groups.float() / scales.float()[..., None]).add_(zeros[..., None])
    return q.clamp_(0, 2**bits - 1).to(torch.uint8)


def _grouped(weight: Tensor, group: int) -> Tensor:
    """(N, K) as (N, G, g); the last group is filled up with zeros, which change no range."""
    missing = -weight.shape[1] % group
    if missing:
        weight = pad(weight, (0, missing))
    return weight.unflatten(1, (-1, group))
