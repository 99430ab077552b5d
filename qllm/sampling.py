"""Drawing tokens: what transformers' processors leave of the logits, and a stream for each prompt.

A token is drawn by the inverse of the distribution's sums, in float64, from one number of the
prompt's own stream: so a seed gives a prompt the same text whatever is generated beside it, and
whichever process draws.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from qllm.config import MAX_SEED
from qllm.errors import UserError
from qllm.models import RawConfig

# What transformers takes where nothing says how many.
DEFAULT_TOP_K = 50
# Below it a quotient of float32 may be infinite; the likeliest alone is drawn long before.
LOWEST_TEMPERATURE = 1e-30
# Streams of one prompt that comes several times are so far apart (the golden ratio of 64 bits).
APART = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; each setting is transformers' of that name, in its order.

    Attributes:
        temperature: divides the logits.
        top_k: how many of the largest logits can be drawn; 0: all.
        top_p: the largest that have this probability together can be drawn.
        min_p: those that have this share of the largest probability can be drawn; None: all.
        seed: of every prompt's stream of random numbers; one that comes again in a batch has
            another. None: a new one each time.
    """

    temperature: float = 1.0
    top_k: int = DEFAULT_TOP_K
    top_p: float = 1.0
    min_p: float | None = None
    seed: int | None = None

    @classmethod
    def read(cls, raw: RawConfig) -> Sampling:
        """The settings of a generation_config.json."""
        names = ("temperature", "top_k", "top_p", "min_p")
        given = {name: raw.values[name] for name in names if raw.values.get(name) is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise raw.error(name, value, "a number")
        return cls(**given)

    def with_changes(self, **changes: float | None) -> Sampling | None:
        """With the settings that are given (not None); None where they say greedy search.

        Raises:
            UserError: for values that cannot be, or that contradict each other.
        """
        given: dict[str, Any] = {
            name: int(value) if _is_whole(value) else value  # numpy's, too
            for name, value in changes.items()
            if value is not None
        }
        if not given:
            return None
        if given.get("temperature") == 0:
            others = [name for name in given if name not in ("temperature", "seed")]
            if others:
                raise UserError(
                    f"a temperature of 0 is greedy search, in which {others[0]} does nothing; "
                    "leave one of them out"
                )
            return None
        changed = replace(self, **given)
        changed.check()
        return changed

    def check(self) -> None:
        """Refuse values that cannot be.

        Raises:
            UserError: names the setting.
        """
        for name, value in vars(self).items():
            if isinstance(value, str | bool):
                raise UserError(f"{name} is {value!r}; give a number")
        bounds = {
            "temperature": (0 < self.temperature < math.inf, "a number above 0, or 0 for none"),
            "top_k": (
                float(self.top_k).is_integer() and self.top_k >= 0,
                "a whole number, or 0 for all tokens",
            ),
            "top_p": (0 < self.top_p <= 1, "a number above 0, up to 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1"),
            "seed": (
                self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed <= MAX_SEED),
                f"a whole number from 0 to {MAX_SEED}",
            ),
        }
        for name, (fits, expected) in bounds.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}; give {expected}")

    def with_seed(self) -> Sampling:
        """The same with a seed: a new one where there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))

    def repeated(self, time: int) -> Sampling:
        """The same for a prompt that has come as often before, with the seed of another stream."""
        return replace(self, seed=((self.seed or 0) + time * APART) & MAX_SEED)

    def seeds(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The seed of each prompt's stream: of one that comes again, another."""
        assert self.seed is not None  # see `with_seed`
        met: dict[tuple[int, ...], int] = {}
        found = []
        for prompt in map(tuple, prompts):
            count = met[prompt] = met.get(prompt, -1) + 1
            found.append(self.repeated(count).seed or 0)
        return found

    def scores(self, logits: Tensor) -> Tensor:
        """Logits (B, V) as they are drawn from: -inf where a token cannot be drawn."""
        if self.temperature != 1:
            logits = logits / max(self.temperature, LOWEST_TEMPERATURE)
        if self.top_k:
            threshold = logits.topk(min(int(self.top_k), logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < threshold, -math.inf)
        if self.top_p < 1:
            rising, order = logits.sort(dim=-1, stable=True)
            sums = rising.softmax(-1).cumsum(-1)
            removed = sums <= 1 - self.top_p
            removed[:, -1] = False
            logits = logits.masked_fill(removed.scatter(1, order, removed), -math.inf)
        if self.min_p is not None:
            shares = logits.softmax(-1)
            threshold = shares.amax(-1, keepdim=True) * self.min_p
            logits = logits.masked_fill(shares < threshold, -math.inf)
        return logits


class Sampler:
    """Draws the next token of each of some prompts.

    Attributes:
        generators: of random numbers, one per prompt.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (B,) drawn from logits (B, V).

        Raises:
            UserError: logits are infinite or NaN, which leaves nothing to draw from.
        """
        scores = self.sampling.scores(logits).to("cpu", torch.float64)
        # Row by row: a kernel may sum many rows in another order than one.
        drawn = [_draw(*pair) for pair in zip(scores, self.generators, strict=True)]
        return torch.tensor(drawn, dtype=torch.int64, device=logits.device)

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with the prompts at these places alone."""
        self.generators = [self.generators[i] for i in indices]


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _draw(scores: Tensor, stream: torch.Generator) -> int:
    """The token at which the sum of probabilities goes beyond a random number."""
    sums = scores.softmax(-1).cumsum(-1)
    if sums[-1].isnan():
        raise UserError(
            "the model's logits are infinite or NaN, and no token can be drawn from them; another "
            "`dtype` (bfloat16, float32) holds larger numbers"
        )
    target = torch.rand((), dtype=torch.float64, generator=stream) * sums[-1]
    # A product that is rounded up to the last sum belongs to the last token that there is.
    last = int(torch.searchsorted(sums, sums[-1:]))
    return min(int(torch.searchsorted(sums, target[None], right=True)), last)
