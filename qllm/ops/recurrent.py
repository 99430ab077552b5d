"""What a layer with a recurrent state keeps of each sequence, in the place of keys and values.

A row is a sequence's, as of a KV cache (`qllm.ops.kv`). Its size does not depend on the length. A
sequence whose pass begins at position 0 begins with zeros, whatever its row held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qllm.ops.kv import Batch, zeros


class StateShape(NamedTuple):
    """Of one row of a layer's state.

    Attributes:
        past: how many tokens a convolution sees besides a token itself.
        channels: C, of that convolution.
        heads: of values.
        key_dim, value_dim: channels of a head's key, and of its value.
    """

    past: int
    channels: int
    heads: int
    key_dim: int
    value_dim: int

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a row, whose activations are of a type."""
        memory = self.heads * self.key_dim * self.value_dim * torch.float32.itemsize
        return memory + self.past * self.channels * dtype.itemsize


class RecurrentState(NamedTuple):
    """The state of one layer.

    Attributes:
        inputs: (R, past, C), of each row the last tokens that its convolution takes, in the type of
            the activations.
        memory: float32 (R, H, D_k, D_v): of each head the sum of keys times values.
    """

    inputs: Tensor
    memory: Tensor

    @classmethod
    def empty(
        cls, rows: int, shape: StateShape, dtype: torch.dtype, device: torch.device | str
    ) -> RecurrentState:
        inputs = zeros((rows, shape.past, shape.channels), dtype, device)
        return cls(inputs, zeros((rows, *shape[2:]), torch.float32, device))


def runs(batch: Batch) -> Iterator[tuple[int, slice, bool]]:
    """Each sequence of a pass: its row, where its tokens are, and whether it begins with them."""
    starts = batch.starts.tolist()
    for row, start, end in zip(batch.rows.tolist(), starts[:-1], starts[1:], strict=True):
        yield row, slice(start, end), int(batch.positions[start]) == 0
