"""MatMulNBits, onnxruntime's product with a matrix of packed integers.

For N output channels, K input channels and blocks of g of them, G = ceil(K / g):

    B            uint8 (N, G, g b / 8)       a block is one little-endian stream of b-bit values
    scales       (N, G), flat                in the type of the activations
    zero_points  uint8 (N, ceil(G b / 8)), flat; left out where each is 2^(b-1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.quant.packing import PackedWeight, pack

OPERATOR, DOMAIN = "MatMulNBits", "com.microsoft"
BITS = (4, 8)
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
# What a channel that is one group is cut into: each block has the channel's scale.
CHANNEL_BLOCK = 128


def block_size(spec: QuantSpec, name: str) -> int:
    """The block that a spec is written with.

    A group that is no block itself, but some of them, is written as equal blocks.

    Raises:
        UserError: for bits or groups that the operator cannot hold.
    """
    if spec.kind != "weight_only" or spec.bits not in BITS:
        raise UserError(
            f"{name} is at bitwidth {spec.bitwidth}; MatMulNBits of onnxruntime takes "
            f"{' and '.join(map(str, BITS))} bits, and 16-bit layers stay as they are"
        )
    if spec.group_size == -1:
        return CHANNEL_BLOCK
    block = min(spec.group_size & -spec.group_size, LARGEST_BLOCK)
    if block < SMALLEST_BLOCK:
        raise UserError(
            f"{name} has group size {spec.group_size}; MatMulNBits of onnxruntime takes "
            f"{SMALLEST_BLOCK} and its multiples, such as 32 or 128, and -1"
        )
    return block


@dataclass(frozen=True)
class NBits:
    """A matrix as the operator takes it; shapes are above.

    Attributes:
        perm: int64 (K,), in which the input channels are to come; None: as they are.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int
    bits: int
    columns: int
    perm: Tensor | None

    @classmethod
    def of(
        cls, packed: PackedWeight, spec: QuantSpec, columns: int, dtype: torch.dtype, name: str
    ) -> NBits:
        """
        Args:
            columns: K.
            dtype: of the activations, and so of the scales.
            name: of the linear, for errors.

        Raises:
            UserError: for what the operator cannot hold, or scales that leave the range of `dtype`.
        """
        block, bits = block_size(spec, name), spec.bits
        rows, blocks = len(packed.qweight), -(-columns // block)
        size = blocks * block * bits // 8
        stored = packed.qweight[:, :size]
        weight = pad(stored, (0, size - stored.shape[1])).view(rows, blocks, -1)
        repeat = blocks if spec.group_size == -1 else spec.group_size // block

        def per_block(values: Tensor) -> Tensor:
            return values.repeat_interleave(repeat, dim=1)[:, :blocks].contiguous()

        scales = per_block(packed.scales.to(dtype))
        if not scales.isfinite().all() or (scales == 0).any():
            raise UserError(f"{name} has scales beyond {dtype}; use `dtype` float32")
        zeros = None
        if packed.qzeros.numel():
            # A row of zero points ends on a byte; `pack` ends it on a word.
            zeros = pack(per_block(packed.qzeros), bits)[:, : -(-blocks * bits // 8)]
            zeros = zeros.contiguous().view(-1)
        return cls(weight, scales.view(-1), zeros, block, bits, columns, packed.perm)
