"""What layers take of tokens beside the states that the layer in front puts out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qllm.config import ModelConfig
from qllm.models.attention import MakeLinear
from qllm.models.embeddings import Embedding, Scale
from qllm.models.norms import NORMS, add


class LayerInputs(nn.Module):
    """What each layer takes of each token beside what is in front of it: Gemma 4.

    Attributes:
        embed: rows (layers P) of a table, by token.
        projection: of embeddings to as many channels.
        norm: of those of each layer.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, make: MakeLinear) -> None:
        super().__init__()
        channels = config.num_layers * config.layer_inputs
        self.embed = Embedding(config.layer_input_rows, channels, dtype)
        self.scale = Scale(torch.tensor(config.layer_inputs**0.5, dtype=dtype, device="cpu").item())
        self.projection = make("layer_inputs.projection", config.hidden_size, channels, False)
        self.projection_scale = Scale(config.hidden_size**-0.5)
        self.norm = NORMS[config.norm](replace(config, hidden_size=config.layer_inputs), dtype)
        self.sum_scale = Scale(0.5**0.5)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """For tokens (N,) and their embeddings x (N, C): (N, layers P)."""
        projected = self.projection_scale(self.projection(x))
        normed = self.norm(projected.view(-1, *self.norm.shape))
        assert isinstance(normed, Tensor)  # nothing that takes int8 is behind it
        own = self.scale(self.embed(tokens).to(x.dtype))
        return self.sum_scale(add(normed.view(projected.shape), own))
