"""What is in front of a decoder's first layer, and its LM head, which may be the same matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import EMBEDDING, LM_HEAD, ModelConfig, QuantSpec
from qllm.layers import Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.attention import MakeLinear


class Embedding(nn.Module):
    """One row of `weight` (V, C) per token."""

    weight: Tensor

    def __init__(self, rows: int, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, channels, dtype=dtype, device="meta"))

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.on(tokens.device.type).embedding(tokens, self.weight, 0)


class QuantizedEmbedding(nn.Module):
    """The same of a packed matrix, which may be the LM head's as well.

    Attributes:
        linear: whose weight (V, C) it is.
        dtype: of the rows.
    """

    def __init__(self, linear: WeightOnlyLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.dtype = linear, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear.look_up(tokens, self.dtype)


def embedding_and_head(
    config: ModelConfig,
    specs: Mapping[str, QuantSpec],
    dtype: torch.dtype,
    make: MakeLinear,
) -> tuple[Embedding | QuantizedEmbedding, Linear]:
    """The token embedding and the LM head, which share a matrix where they are tied."""
    sizes = (config.embed_size, config.vocab_size)
    shape = (*sizes, config.head_bias)
    tied = config.tied_head and LM_HEAD not in specs
    if EMBEDDING in specs:
        table = make(EMBEDDING, *sizes, False)
        assert isinstance(table, WeightOnlyLinear)  # as `QuantPlan.resolve` has it
        return QuantizedEmbedding(table, dtype), table if tied else make(LM_HEAD, *shape)
    embed, head = Embedding(config.vocab_size, config.embed_size, dtype), make(LM_HEAD, *shape)
    if tied:
        head.weight = embed.weight
    return embed, head


class Scale(nn.Module):
    """x times a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    @classmethod
    def of_embeddings(cls, config: ModelConfig, dtype: torch.dtype) -> Scale:
        """What multiplies a model's embeddings, which are of `dtype`."""
        factor = config.embed_scale
        if config.embed_scale_rounds:
            factor = torch.tensor(factor, dtype=dtype, device="cpu").item()
        return cls(factor)

    def forward(self, x: Tensor) -> Tensor:
        return ops.on(x.device.type).scale(x, self.factor)
