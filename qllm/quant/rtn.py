"""Round-to-nearest quantization, group by group: the arithmetic every other algorithm shares.

For a group w at b bits:

- asymmetric: lo = min(0, min w), hi = max(0, max w), scale = (hi - lo) / (2^b - 1),
  zero = round(-lo / scale)
- symmetric: scale = 2 max|w| / (2^b - 1), zero = 2^(b-1)
- q = clamp(round(w / scale) + zero, 0, 2^b - 1), and back (q - zero) * scale
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.quant.packing import PackedWeight, group_width, pack, packed_size

# Scales and least values (N, G) of weights (N, K) at some bits, group size and scheme.
FindQParams = Callable[[Tensor, int, int, str], tuple[Tensor, Tensor]]

# Rows are quantized in pieces of about this many weights: the float32 temporaries stay in cache,
# and small beside the matrix.
CHUNK_ELEMENTS = 1 << 20

# float16 has subnormal numbers in steps of 2^-24: a smaller scale would be off by up to 1 in 256,
# which at 8 bits is a whole step at the ends of the range.
SMALLEST_HALF_SCALE = 2.0**-17


def quantize_rtn(
    weight: Tensor,
    bits: int,
    group_size: int,
    scheme: str,
    find_qparams: FindQParams | None = None,
    all_fit: Callable[[bool], bool] = bool,
) -> PackedWeight:
    """Quantize a matrix to nearest.

    Args:
        weight: floating point (N, K), finite: N output channels of K input channels.
        bits: 1 to 8.
        group_size: input channels per group, -1 for K; a last, shorter group is one of its own.
        scheme: "sym" or "asym".
        find_qparams: finds the groups' grids; None is `minmax_qparams`.
        all_fit: see `store_scales`.
    """
    rows, columns = weight.shape
    group = group_width(columns, group_size)
    scales, min_vals = (find_qparams or minmax_qparams)(weight, bits, group, scheme)
    # One decision for the matrix: its scales have one type.
    scales = store_scales(scales, all_fit)
    zeros = zero_points(min_vals, scales, bits, scheme)
    packed = weight.new_empty(rows, packed_size(columns, bits), dtype=torch.uint8)
    for piece in row_pieces(weight):
        groups = grouped(weight[piece], group)
        integers = round_to_grid(groups, scales[piece], zeros[piece], bits)
        packed[piece] = pack(integers.flatten(1)[:, :columns], bits)
    return PackedWeight(packed, scales, zeros if scheme == "asym" else zeros.new_empty(0))


def fake_quantize(
    weight: Tensor, bits: int, group_size: int, scheme: str, find_qparams: FindQParams | None = None
) -> Tensor:
    """What a matrix (N, K) is after `quantize_rtn` and back: float32 (N, K)."""
    columns = weight.shape[1]
    group = group_width(columns, group_size)
    scales, min_vals = (find_qparams or minmax_qparams)(weight, bits, group, scheme)
    scales = store_scales(scales)
    zeros = zero_points(min_vals, scales, bits, scheme)
    result = torch.empty_like(weight, dtype=torch.float32)
    for piece in row_pieces(weight):
        back = round_trip(grouped(weight[piece], group), scales[piece], zeros[piece], bits)
        result[piece] = back.flatten(1)[:, :columns]
    return result


def minmax_qparams(
    weight: Tensor, bits: int, group_size: int, scheme: str
) -> tuple[Tensor, Tensor]:
    """Scales and least values of the groups of weights (N, K): two float32 (N, G).

    Each grid reaches from the least weight of its group to the largest.
    """
    group = group_width(weight.shape[1], group_size)
    scales = weight.new_empty(len(weight), -(-weight.shape[1] // group), dtype=torch.float32)
    min_vals = torch.empty_like(scales)
    for piece in row_pieces(weight):
        scales[piece], min_vals[piece] = group_qparams(grouped(weight[piece], group), bits, scheme)
    return scales, min_vals


def row_pieces(weight: Tensor, elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """Runs of rows, of about so many weights each."""
    step = max(1, elements // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def group_qparams(groups: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Scales and least values of groups: (N, G, g) to two float32 (N, G)."""
    groups = groups.float()
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)  # aminmax is not vectorized here
    if scheme == "sym":
        scale = torch.maximum(-low, high) * 2 / (2**bits - 1)
    else:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        scale = (high - low) / (2**bits - 1)
    return torch.where(scale == 0, 1.0, scale), low


def store_scales(scales: Tensor, all_fit: Callable[[bool], bool] = bool) -> Tensor:
    """Scales in the type they are stored in: float16, unless one over- or underflows there.

    Args:
        all_fit: of a part of a matrix, takes whether its scales fit and returns whether all do.
    """
    half = scales.to(torch.float16)
    fits = bool(half.isfinite().all() and (half >= SMALLEST_HALF_SCALE).all())
    return half if all_fit(fits) else scales


def zero_points(min_vals: Tensor, scales: Tensor, bits: int, scheme: str) -> Tensor:
    """Zero points of groups with such least values and scales as stored, (N, G): uint8 (N, G)."""
    if scheme == "sym":
        return torch.full_like(min_vals, 2 ** (bits - 1), dtype=torch.uint8)
    return torch.round(-min_vals / scales.float()).clamp_(0, 2**bits - 1).to(torch.uint8)


def round_to_grid(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """q of groups (N, G, g), given scales and zeros (N, G): uint8 (N, G, g)."""
    return to_grid(groups, scales, zeros, bits).to(torch.uint8)


def to_grid(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """`round_to_grid` in float32."""
    q = torch.round(groups.float() / scales.float()[..., None]).add_(zeros[..., None])
    return q.clamp_(0, 2**bits - 1)


def round_trip(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Groups (N, G, g) to the grid and back: float32."""
    back = to_grid(groups, scales, zeros, bits)
    return back.sub_(zeros[..., None]).mul_(scales[..., None])


def grouped(weight: Tensor, group: int) -> Tensor:
    """(N, K) as (N, G, g); the last group is filled up with zeros, which change no range."""
    missing = -weight.shape[1] % group
    if missing:
        weight = pad(weight, (0, missing))
    return weight.unflatten(1, (-1, group))
