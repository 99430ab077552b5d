"""How each family tells its decoder where a token stands: learned, ALiBi or rotary.

A decoder calls `embed` once on the embeddings; in every layer attention turns queries and keys by
`angles`, and adds `slopes` times the distance to the scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import ModelConfig

# OPT's table of positions starts with two rows that no position uses.
LEARNED_OFFSET = 2


class PositionEncoding(nn.Module):
    """What all share: nothing is added, turned or sloped.

    Attributes:
        slopes: float32 (H,), by which scores fall with the distance; None: they do not.
    """

    slopes: Tensor | None = None

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add to the embeddings (N, hidden) of tokens at `positions` (N,)."""
        return x

    def angles(
        self, positions: Tensor, longest: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines (N, D) for tokens at `positions` (N,); the largest is longest - 1."""
        return None

    def table(
        self, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """The angles of every position in a cache, (capacity, D); None: they depend on more."""
        return None


class LearnedPositions(PositionEncoding):
    """OPT: a learned vector per position is added to the embedding. Buffer: weight (P + 2, C)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        rows = config.max_positions + LEARNED_OFFSET
        weight = torch.empty(rows, config.hidden_size, dtype=dtype, device="meta")
        self.register_buffer("weight", weight)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        kernels = ops.on(x.device.type)
        return kernels.add(x, kernels.embedding(positions, self.weight, LEARNED_OFFSET))


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each head (Press et al. 2022): float32 (heads,).

    For a power of two they are the powers of 2^(-8/heads); another count takes those of the
    power of two below it, then every second one of the power above.
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    slopes += [2 ** (-4 * i / below) for i in range(1, 2 * (heads - below), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


class AlibiPositions(PositionEncoding):
    """BLOOM: scores fall with the distance of query and key, at a slope of its own per head."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.slopes = alibi_slopes(config.num_heads)


class RotaryPositions(PositionEncoding):
    """Llama: queries and keys are turned, pair by pair, by angles that grow with the position."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config

    def frequencies(self, longest: int) -> Tensor:
        """Radians per position of each pair, float32 (D / 2,).

        Only "dynamic" scaling (NTK-aware) depends on the length of the sequence so far.
        """
        rope, dim = self.config.rope, self.config.head_dim
        theta = rope.theta
        if rope.kind == "dynamic":
            trained = self.config.trained_positions
            stretch = rope.factor * max(longest, trained) / trained - (rope.factor - 1)
            theta *= stretch ** (dim / (dim - 2))
        frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
        if rope.kind == "linear":
            return frequencies / rope.factor
        if rope.kind == "llama3":
            return self._scale_llama3(frequencies)
        return frequencies

    def _scale_llama3(self, frequencies: Tensor) -> Tensor:
        """Llama 3.1's scaling: slow pairs are slowed by `factor`, fast ones kept, with a ramp."""
        rope = self.config.rope
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        ramp = ramp.clamp(0, 1)
        return (1 - ramp) * frequencies / rope.factor + ramp * frequencies

    def angles(self, positions: Tensor, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = self.frequencies(longest).to(positions.device)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)  # (N, D)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def table(
        self, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        if self.config.rope.kind == "dynamic":
            return None
        return self.angles(torch.arange(capacity, device=device), capacity, dtype)


POSITIONS: dict[str, type[PositionEncoding]] = {
    "learned": LearnedPositions,
    "alibi": AlibiPositions,
    "rope": RotaryPositions,
}
