"""What each linear's bits cost in divergence: measured once per model, kept in a file.

The squared error of a linear's output over the calibration text, tr(dW H dW^T) over tr(W H W^T),
says how the candidates of one linear compare, and nothing of how linears compare: the network
behind them weighs them differently. So the float model is run with one linear at a time at few
bits, and the divergence that this makes, over the linear's error, is the linear's weight. To second
order divergences of several linears add up. Some plans of mixed bits are run as well: they say by
how much that is missed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.files import parse_json, read_bytes

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What was measured of a model's linears, and what it says of a plan.

    Attributes:
        modules: names of the M linears, or of as many decisions on experts' linears.
        candidates: the C specs that each may have, by rising bits.
        errors: (M, C), squared output error over the squared output.
        float32_scales: int (M, C), how many linears have scales that float16 does not hold.
        probe: the candidate that each linear was run at while all others were float.
        alone: (M,), the divergences of those runs from the float model, nats per token.
        choices: int (P, M), the candidates of P plans of mixed bits.
        divergences: (P,), theirs.
        about: what was measured: the model's fingerprint, the text, the algorithm.
    """

    modules: tuple[str, ...]
    candidates: tuple[QuantSpec, ...]
    errors: Array
    float32_scales: NDArray[np.int64]
    probe: int
    alone: Array
    choices: NDArray[np.int64]
    divergences: Array
    about: Mapping[str, object]

    @property
    def sums(self) -> Array:
        """(M, C): the divergence that each candidate makes by itself, nats."""
        probed = self.errors[:, self.probe]
        # A linear that its grid holds exactly, such as one of zeros, adds nothing at any bits.
        weights = np.divide(self.alone, probed, out=np.zeros_like(probed), where=probed > 0)
        return self.errors * weights[:, None]

    def fit(self) -> Fit:
        """What a sum of divergences comes to when its linears are quantized together."""
        picked = np.take_along_axis(self.sums, self.choices.T, axis=1)  # (M, P)
        return fit(picked.sum(axis=0), self.divergences)

    def to_json(self) -> dict[str, object]:
        return {
            "about": dict(self.about),
            "modules": list(self.modules),
            "candidates": [spec.to_json() for spec in self.candidates],
            "errors": self.errors.tolist(),
            "float32_scales": self.float32_scales.tolist(),
            "probe": self.probe,
            "alone": self.alone.tolist(),
            "choices": self.choices.tolist(),
            "divergences": self.divergences.tolist(),
        }

    @classmethod
    def from_file(cls, path: Path) -> Sensitivity:
        """The inverse of `to_json`.

        Raises:
            UserError: for a file that is none.
        """
        value = parse_json(read_bytes(path), str(path))
        try:
            errors = np.array(value["errors"], dtype=np.float64)
            # Tables from before scales were counted do not speak of them; few models have any.
            scales = value.get("float32_scales", np.zeros_like(errors))
            found = cls(
                tuple(value["modules"]),
                tuple(QuantSpec.from_json(spec) for spec in value["candidates"]),
                errors,
                np.array(scales, dtype=np.int64),
                int(value["probe"]),
                np.array(value["alone"], dtype=np.float64),
                np.array(value["choices"], dtype=np.int64),
                np.array(value["divergences"], dtype=np.float64),
                dict(value["about"]),
            )
            fits = found._is_whole() and bool(found.fit())
        except (KeyError, TypeError, ValueError, UserError):
            fits = False
        if not fits:
            raise UserError(f"{path} is no table of losses; leave `table` out to measure a new one")
        return found

    def _is_whole(self) -> bool:
        count, plans = (len(self.modules), len(self.candidates)), len(self.divergences)
        tables = (self.errors, self.float32_scales, self.alone, self.choices)
        shapes = [table.shape for table in tables]
        if shapes != [count, count, count[:1], (plans, count[0])]:
            return False
        if not 0 <= self.probe < count[1]:
            return False
        if not ((self.choices >= 0) & (self.choices < count[1])).all():
            return False
        values = (self.errors, self.float32_scales, self.alone, self.divergences)
        return all(bool((np.isfinite(value) & (value >= 0)).all()) for value in values)


# Two linears that lose something lose about the sum of it: powers are about 1.
LEAST_POWER = 0.25
LARGEST_LOG = 700.0  # of what a float64 holds


@dataclass(frozen=True)
class Fit:
    """The divergence of a plan from the sum of its linears' own: factor * sum ** power.

    Attributes:
        error: root mean square of the logarithms of what it misses each plan by, so that 0.1 is
            about 10%.
    """

    factor: float
    power: float
    error: float

    def divergence(self, total: float) -> float:
        """Nats per token."""
        return self.factor * total**self.power if total else 0.0

    def total(self, divergence: float) -> float:
        """The inverse."""
        return math.exp(min(math.log(divergence / self.factor) / self.power, LARGEST_LOG))


def fit(sums: Array, divergences: Array) -> Fit:
    """A line through the logarithms of what P plans come to: (P,) each, 0 or more.

    Raises:
        UserError: fewer than two plans lose anything.
    """
    told = (sums > 0) & (divergences > 0)  # a plan whose linears are all float says nothing
    if told.sum() < 2:
        raise UserError("no bits of the linears change what the model says: all plans are as good")
    x, y = np.log(sums[told]), np.log(divergences[told])
    power, shift = np.polyfit(x, y, 1)
    if power < LEAST_POWER:  # noise: what is lost is next to nothing, or hardly differs
        power, shift = 1.0, (y - x).mean()
    missed = y - (power * x + shift)
    return Fit(float(np.exp(shift)), float(power), float(np.sqrt(np.square(missed).mean())))


def draw_choices(
    modules: int, candidates: Sequence[QuantSpec], plans: int, seed: int
) -> NDArray[np.int64]:
    """Plans of mixed bits (P, M): each is near one candidate, and its linears are some lower or
    higher, so that what each of them adds can be told apart where it will be decided.

    Args:
        candidates: by rising bits; the last one may be 16 bits.
    """
    draw = np.random.default_rng(seed)
    quantized = [i for i, spec in enumerate(candidates) if spec.kind != "dense"]
    centers = np.array([quantized[p % len(quantized)] for p in range(plans)])
    steps = draw.integers(-1, 2, size=(plans, modules))
    return np.clip(centers[:, None] + steps, 0, len(candidates) - 1)


def write(path: Path, sensitivity: Sensitivity) -> None:
    """Keep it in a file, which is there when it is whole."""
    from qllm.checkpoint.writer import new_file

    with new_file(path) as temporary:
        temporary.write_text(json.dumps(sensitivity.to_json()) + "\n", encoding="utf-8")
