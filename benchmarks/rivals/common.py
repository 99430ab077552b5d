"""What the rivals share: the layer that all of them hold, and what can be measured of each.

All hold the same layer: y = x @ W.t(), W from the same random codes, scales and zeros. They do not
all compute the same: some keep x as it is, some round it to int8 in groups first, which a rival's
`name` says and its `error` shows. Values fit whatever type a rival keeps them in (scales have
bfloat16's 8 bits, zeros are within 2 of the middle), so that the error is of the arithmetic alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tools.random_checkpoint import PUBLISHED, write_checkpoint

if TYPE_CHECKING:
    from benchmarks.rivals.interleaved import Settings

DEVIATION = 0.02  # of the weights
ROWS_CHECKED = 4
PREFILL_RUNS = 1  # that count, in each round


@dataclass(frozen=True)
class LayerBench:
    """A rival's layer, in several copies that together do not fit the cache.

    Attributes:
        name: the operation and its setting.
        bits: as --bitwidth has them.
        size: bytes of one copy's weights, as they are read.
        error: of the worst copy, ||y - expected|| / ||expected||, against the float product.
        run: multiplies so many rows by one copy, the next one at each call. The first call with a
            number of rows makes the input and runs all copies once.
    """

    name: str
    bits: str
    size: int
    error: float
    run: Callable[[int], None]


@dataclass(frozen=True)
class Model:
    """A rival's model with random weights.

    Attributes:
        name: the rival and its format.
        bits: of the weights.
        size: bytes of the model's file or of its tensors.
        prefill: median seconds for one prompt of so many tokens, logits of its last token alone.
        decode: (batch, context, steps) -> median seconds of a step, which runs the model on a
            token for each sequence behind `context` others and takes the greatest logit.
    """

    name: str
    bits: str
    size: int
    prefill: Callable[[int], float]
    decode: Callable[[int, int, int], float]

    @property
    def facts(self) -> dict[str, object]:
        """What is known before anything is measured."""
        return {"name": self.name, "bits": self.bits, "bytes": self.size}


@dataclass(frozen=True)
class Layer:
    """Random integers with a scale and a zero per group of input channels.

    W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], g = k // group

        codes   (N, K)           uint8
        zeros   (N, K / group)   uint8
        scales  (N, K / group)   float32
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    bits: int

    @classmethod
    def draw(cls, n: int, k: int, bits: int, group: int, *, symmetric: bool = False) -> Layer:
        """A layer from a fixed seed.

        Args:
            group: input channels per scale, -1 for all.
            symmetric: all zeros in the middle, at 2**(bits - 1).
        """
        group = k if group == -1 else group
        if k % group:
            raise ValueError(f"{k} input channels are not a multiple of the group size {group}")
        draw = torch.Generator().manual_seed(0)
        codes = torch.randint(1 << bits, (n, k), dtype=torch.uint8, generator=draw)
        shape, middle, reach = (n, k // group), 1 << (bits - 1), 0 if symmetric else 2
        zeros = torch.randint(
            middle - reach, middle + reach + 1, shape, dtype=torch.uint8, generator=draw
        )
        # The uniform codes' deviation is 2**bits / sqrt(12); the factors' mean is 1.
        scales = (0.5 + torch.rand(shape, generator=draw)) * DEVIATION * 12**0.5 / (1 << bits)
        return cls(codes, zeros, scales.bfloat16().float(), bits)

    @property
    def group(self) -> int:
        """Input channels per scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def size(self) -> int:
        """Bytes with packed codes and zeros and 16-bit scales."""
        integers = self.codes.numel() + self.zeros.numel()
        return integers * self.bits // 8 + 2 * self.scales.numel()

    def rolled(self, rows: int) -> Layer:
        """A copy with other bytes: output channels moved on."""
        moved = (tensor.roll(rows, 0) for tensor in (self.codes, self.zeros, self.scales))
        return Layer(*moved, self.bits)

    def signed(self) -> torch.Tensor:
        """Codes of a symmetric 8-bit layer as int8."""
        return (self.codes.short() - 128).to(torch.int8)

    def dense(self) -> torch.Tensor:
        """W, (N, K), in float32."""
        n, groups = self.scales.shape
        centered = self.codes.view(n, groups, -1).float() - self.zeros[..., None].float()
        return (centered * self.scales[..., None]).view(n, -1)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """(..., C) codes below 16 -> (..., ceil(C / 2)) bytes, the first of a pair in the low bits."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def layer_bench(
    name: str,
    bits: str,
    size: int,
    dense: torch.Tensor,
    copies: Sequence[Callable[[Any], Any]],
    *,
    prepare: Callable[[torch.Tensor], Any],
    finish: Callable[[int, Any], torch.Tensor],
) -> LayerBench:
    """Check copies of a layer and put them in turn.

    Args:
        dense: (N, K), the weights of copy 0; those of copy i are rolled by i rows.
        copies: each multiplies an input of the rival's own type by its weights.
        prepare: makes that input of (M, K) in float32.
        finish: (i, what copy i returned) -> (M, N).
    """
    k = dense.shape[1]
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS_CHECKED, k, generator=draw)
    expected, prepared = x @ dense.t(), prepare(x)
    errors = []
    for index, copy in enumerate(copies):
        found = finish(index, copy(prepared)).float()
        errors.append(((found - expected.roll(index, 1)).norm() / expected.norm()).item())
    inputs: dict[int, Any] = {}
    turn = itertools.cycle(copies)

    def run(rows: int) -> None:
        if rows not in inputs:
            inputs[rows] = prepare(torch.randn(rows, k, generator=draw))
            for copy in copies:
                copy(inputs[rows])
        next(turn)(inputs[rows])

    return LayerBench(name, bits, size, max(errors), run)


def random_prompts(count: int, length: int, vocab: int) -> np.ndarray:
    """(count, length) token ids."""
    return np.random.default_rng(0).integers(vocab, size=(count, length))


def published(repository: str, settings: Settings) -> dict:
    """A published config.json, with the layers that are asked for and positions enough."""
    config = dict(PUBLISHED[repository])
    if settings.layers is not None:
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = settings.layers
    if "max_position_embeddings" in config:
        longest = max(settings.prompt, settings.context + settings.steps + 1)
        config["max_position_embeddings"] = max(config["max_position_embeddings"], longest)
    return config


def checkpoint(folder: Path, repository: str, settings: Settings) -> Path:
    """A checkpoint of a published configuration below `folder`, written where it is not there."""
    target = folder / repository.replace("/", "--")
    if not target.exists():
        write_checkpoint(target, published(repository, settings))
    return target
