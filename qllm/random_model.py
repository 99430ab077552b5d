"""A model's architecture with fresh weights that take no memory, and its activation statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qllm.calibration import Calibration, calibrate
from qllm.config import ModelConfig
from qllm.layers import Linear
from qllm.memory import check_fits
from qllm.models import Decoder
from qllm.models.embeddings import Embedding
from qllm.models.mlp import inner_channels
from qllm.models.positions import LearnedPositions

RANDOM_SOURCE = "random input"


class RandomLinear(nn.Module):
    """A linear layer with a fresh Gaussian weight, without the weight.

    With W's entries independent and of deviation std, the columns of x W^T are independent, and
    each is Gaussian over the M tokens with covariance std^2 x x^T. So the product is drawn from
    its own distribution, in time and memory that do not know the size of W. The bias is zero, as
    a fresh one is.
    """

    def __init__(
        self, in_features: int, out_features: int, std: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.std, self.generator = std, generator

    def forward(self, x: Tensor) -> Tensor:
        gram = x.double() @ x.double().t()
        # A token that repeats makes the matrix singular; its own scale times 1e-9 does not show.
        gram.diagonal().mul_(1 + 1e-9).add_(1e-30)
        root = torch.linalg.cholesky(gram).float() * self.std
        noise = torch.randn(x.shape[0], self.out_features, generator=self.generator)
        return root @ noise


class RandomEmbedding(nn.Module):
    """A fresh embedding table, without the table: a row is drawn for each token as it comes."""

    def __init__(self, channels: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.channels, self.std, self.generator = channels, std, generator
        # No rows, but the type and device that a decoder asks its embedding for.
        self.register_buffer("weight", torch.empty(0, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        drawn = torch.randn(len(tokens), self.channels, generator=self.generator)
        return drawn * self.std


class RandomPositions(LearnedPositions):
    """Learned positions as they are before training; only those in use have memory."""

    def __init__(
        self, config: ModelConfig, length: int, std: float, generator: torch.Generator
    ) -> None:
        super().__init__(config, torch.float32)
        rows = length + config.position_offset
        self.weight = torch.randn(rows, config.hidden_size, generator=generator) * std


def random_model(config: ModelConfig, length: int, seed: int) -> Decoder:
    """The real architecture with fresh weights that take no memory: any size runs in seconds.

    Args:
        length: the longest sample it will be given.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config, {}, torch.float32)
    for name, module in list(model.named_modules()):
        new: nn.Module | None = None
        if isinstance(module, Linear):
            new = RandomLinear(module.in_features, module.out_features, config.init_std, generator)
        elif isinstance(module, Embedding):
            new = RandomEmbedding(module.weight.shape[1], config.init_std, generator)
        elif isinstance(module, LearnedPositions):
            new = RandomPositions(config, length, config.init_std, generator)
        else:
            for key, buffer in module.named_buffers(recurse=False):
                # Of norms, which multiply by one at first, offset and all.
                value = 1.0 - config.norm_offset if key == "weight" else 0.0
                setattr(module, key, torch.full(buffer.shape, value))
        if new is not None:
            model.set_submodule(name, new)
    return model


def _bytes(config: ModelConfig, length: int) -> int:
    """What statistics and one sample take, with no more than a config.json to go by."""
    heads = config.num_heads + 2 * config.num_kv_heads
    widths = (heads * config.head_dim, config.hidden_size, 2 * inner_channels(config))
    each = sum(widths) if config.experts is None else sum(widths) * config.experts.count
    channels = config.num_layers * 2 * each + config.vocab_size
    # Some copies of the widest activations, the scores of all heads, and Python's own numbers.
    tokens = length * (4 * max(*widths, config.vocab_size) + length * config.num_heads)
    return 4 * (channels + tokens) + 100 * config.num_heads


def calibrate_random(config: ModelConfig, samples: int, length: int, seed: int) -> Calibration:
    """Statistics of random tokens through fresh weights: ranges to run with, not to judge by.

    Raises:
        UserError: for a config.json whose model would not fit into memory even so.
    """
    check_fits(_bytes(config, length), "cpu", f"a {config.family} of these sizes, without weights,")
    model = random_model(config, length, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (samples, length), generator=generator)
    return calibrate(model, tokens.tolist())
