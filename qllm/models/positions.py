"""How each family tells its decoder where a token stands: learned, ALiBi or rotary.

A decoder calls `embed` once on the embeddings; in every layer attention rotates queries and keys by
`cos_sin`, and adds `slopes` times the distance to the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qllm import ops
from qllm.config import ModelConfig


class PositionEncoding(nn.Module):
    """What all share: nothing is added, rotated or sloped.

    Attributes:
        slopes: float32 (H,), by which scores fall with the distance; None: they do not.
        kinds: what counts in layers that see all tokens, and in those with a window.
    """

    slopes: Tensor | None = None

    @property
    def kinds(self) -> tuple[PositionEncoding, ...]:
        return (self,)

    def kind(self, layer: int) -> int | None:
        """Which of `kinds` a layer has; None: its queries and keys stay as they are."""
        return 0

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add to the embeddings (N, hidden) of tokens at `positions` (N,)."""
        return x

    def cos_sin(
        self, positions: Tensor, lengths: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, ...] | None:
        """Cosines and sines (N, D) for tokens at `positions` (N,).

        Where queries grow with the position, the factors of them (N,) come third.

        Args:
            lengths: of the sequence that each token is in, N of them, or of all, one.
        """
        return None

    def table(
        self, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...] | None:
        """`cos_sin` of every position in a cache, (capacity, D); None: they depend on more."""
        return None


class LearnedPositions(PositionEncoding):
    """OPT, GPT-2: a learned vector per position is added to the embedding.

    Buffer: weight (offset + P, C).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.offset = config.position_offset
        assert config.max_positions is not None  # as a family that learns them reads it
        rows = config.max_positions + self.offset
        weight = torch.empty(rows, config.hidden_size, dtype=dtype, device="meta")
        self.register_buffer("weight", weight)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        kernels = ops.on(x.device.type)
        return kernels.add(x, kernels.embedding(positions, self.weight, self.offset))


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
    """Llama: queries and keys are rotated, pair by pair, by angles that grow with the position."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self._of_windows: RotaryPositions | None = None
        if config.window_rope is not None:
            changed = replace(config, rope=config.window_rope, window_rope=None)
            self._of_windows = RotaryPositions(_of_some(changed, windowed=True), dtype)
        config = _of_some(config, windowed=False)
        assert config.rope is not None  # as a family whose positions are rotated reads it
        self.config, self.rope = config, config.rope
        self.rotary_dim = self.rope.rotary_dim or config.head_dim

    @property
    def kinds(self) -> tuple[RotaryPositions, ...]:
        return (self,) if self._of_windows is None else (self, self._of_windows)

    def kind(self, layer: int) -> int | None:
        config = self.config
        if config.rope_layers and not config.rope_layers[layer]:
            return None
        windowed = bool(config.windows) and config.windows[layer] > 0
        return int(windowed and self._of_windows is not None)

    @property
    def factors(self) -> Tensor:
        """What multiplies the cosine and sine of each pair, 1 for one that stays: (D / 2,)."""
        rotated = torch.full((-(-self.rotary_dim // 2),), self.rope.attention_factor)
        return pad(rotated, (0, self.config.head_dim // 2 - len(rotated)), value=1.0)

    def frequencies(self, length: int) -> Tensor:
        """Radians per position of each pair, float32 (D / 2,); those that stay have 0.

        "dynamic" (NTK-aware) and "longrope" depend on the length of the sequence so far.
        """
        rotated = self._rotated_frequencies(length)
        return pad(rotated, (0, self.config.head_dim // 2 - len(rotated)))

    def _rotated_frequencies(self, length: int) -> Tensor:
        """The frequencies of the pairs that rotate."""
        rope, dim = self.rope, self.rotary_dim
        theta = rope.theta
        if rope.kind == "dynamic":
            trained = self.config.trained_positions
            stretch = rope.factor * max(length, trained) / trained - (rope.factor - 1)
            theta *= stretch ** (dim / (dim - 2))
        periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if rope.kind == "longrope":
            beyond = length > rope.original_max_positions
            factors = rope.long_factor if beyond else rope.short_factor
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * periods)
        frequencies = 1.0 / periods
        if rope.kind == "linear":
            return frequencies / rope.factor
        if rope.kind == "llama3":
            rotations = rope.original_max_positions * frequencies / (2 * math.pi)
            smooth_factor = (rotations - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            return self._stretched(frequencies, smooth_factor)
        if rope.kind == "yarn":
            return self._stretched(frequencies, 1 - self._yarn_ramp())
        if rope.kind == "proportional":
            frequencies[rope.rotated_pairs :] = 0
            return frequencies / rope.factor
        return frequencies

    def _stretched(self, frequencies: Tensor, smooth_factor: Tensor) -> Tensor:
        """Frequencies, slowed down but for a share of each: `smooth_factor` (D / 2,)."""
        smooth_factor = smooth_factor.clamp(0, 1)
        return (1 - smooth_factor) * frequencies / self.rope.factor + smooth_factor * frequencies

    def _yarn_ramp(self) -> Tensor:
        """YaRN's ramp over the pairs, from 0 for the fastest to 1 for the slowest: (D / 2,)."""
        rope, dim = self.rope, self.rotary_dim

        def pair(rotations: float) -> float:
            """Which pair turns so often over the length that the model was trained on."""
            length = math.log(rope.original_max_positions) - math.log(2 * math.pi)
            return dim * (length - math.log(rotations)) / (2 * math.log(rope.theta))

        low, high = pair(rope.beta_fast), pair(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001  # as transformers has it, so that nothing is divided by 0
        return (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)

    def cos_sin(
        self, positions: Tensor, lengths: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        frequencies = self._frequencies_of_tokens(lengths).to(positions.device)
        angles = positions[:, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)  # (N, D)
        factor = self.factors.to(positions.device).repeat(2)
        found = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        if not self.rope.query_beta or max(lengths) <= self.rope.query_span:
            return found  # whose queries would all be multiplied by 1
        return *found, self.query_factors(positions).to(dtype)

    def query_factors(self, positions: Tensor) -> Tensor:
        """What multiplies the queries of tokens at `positions` (N,), float32 (N,)."""
        spans = torch.floor(positions.float() / self.rope.query_span)
        return 1 + self.rope.query_beta * torch.log(1 + spans)

    def _frequencies_of_tokens(self, lengths: Sequence[int]) -> Tensor:
        """Those of each token by its own sequence, (N, D / 2), or of all, (D / 2,).

        transformers takes the longest sequence of the batch for all of them; here no sequence
        changes what another one gets.
        """
        distinct = list(dict.fromkeys(lengths))
        if self.rope.kind not in ("dynamic", "longrope") or len(distinct) == 1:
            return self.frequencies(distinct[0])
        index = {length: i for i, length in enumerate(distinct)}
        found = torch.stack([self.frequencies(length) for length in distinct])
        return found[torch.tensor([index[length] for length in lengths])]

    def table(
        self, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...] | None:
        rope = self.rope
        if rope.kind == "dynamic":
            return None
        if rope.kind == "longrope" and capacity > rope.original_max_positions:
            return None
        return self.cos_sin(torch.arange(capacity, device=device), [capacity], dtype)


def _of_some(config: ModelConfig, *, windowed: bool) -> ModelConfig:
    """A model with the sizes of its layers that have a window, or of those that have none."""
    windows = config.windows or (0,) * config.num_layers
    some = [index for index, window in enumerate(windows) if bool(window) == windowed]
    return config.of_layer(some[0]) if some else config


POSITIONS: dict[str, type[PositionEncoding]] = {
    "learned": LearnedPositions,
    "alibi": AlibiPositions,
    "rope": RotaryPositions,
}
