"""Limits that even the smallest choice breaks: told before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qllm.config import EMBEDDING, LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.layers import linear_class
from qllm.plan.cluster_file import UNITS
from qllm.plan.milp import TOLERANCE
from qllm.plan.sensitivity import Array
from qllm.plan.shape import Shape, Workload

SIZE, MEMORY, CLUSTER = "`max_bytes`", "`memory`", "`cluster`"
ONE_BIT = QuantSpec(1, group_size=-1, kind="weight_only")


@dataclass(frozen=True)
class Asked:
    """What there is to choose from, and what it has to fit.

    Attributes:
        tied: the model's LM head is its embedding, unless it is decided on by itself.
        allowed: bool (M, C), what each linear may have.
        is_fixed: some linears are held, so that this is less than all candidates.
        memory: bytes of each device; infinite where it does not matter.
        option: the one that names the memory: SIZE, which is of weights alone, MEMORY or CLUSTER.
    """

    shape: Shape
    tied: bool
    work: Workload
    candidates: Sequence[QuantSpec]
    allowed: np.ndarray
    is_fixed: bool
    memory: Sequence[float]
    option: str

    def check(self, max_bits: float | None) -> None:
        """Refuse limits that even the fewest bits break.

        Args:
            max_bits: mean bits per weight; None: no limit.

        Raises:
            UserError: with the numbers, and with the options of which each would do.
        """
        missing = self._missing(self._fewest(self.shape.held(len(self.memory))), self.work)
        if missing > 0:
            memory = sum(self.memory)
            raise UserError(
                f"nothing fits: the fewest bits take {_text(memory + missing)} and there are "
                f"{_text(memory)}, {_text(missing)} are missing; what would do: "
                + ", or ".join(self._remedies(missing))
            )
        weights = self.shape.weights
        fewest = float((weights * self._fewest(self.shape.bits)).sum() / weights.sum())
        if max_bits is not None and fewest > max_bits + TOLERANCE:
            given = "`bits` and `fixed`" if self.is_fixed else "`bits`"
            enough = math.ceil(1e3 * fewest) / 1e3
            raise UserError(
                f"`max_bits` {max_bits:g} is below the fewest of {given}, {fewest:.4g} with their "
                f"scales and zeros; give {enough:g} or more"
            )

    def _fewest(self, table: Array) -> Array:
        """The least that each linear may have in a table (M, C)."""
        return np.where(self.allowed, table, np.inf).min(axis=1)

    def _missing(self, linears: Array, work: Workload) -> float:
        """Bytes by which the memory is too small; 0 or less: it is not.

        Args:
            linears: (M,), bytes of each.
        """
        shape = self.shape
        held = float(linears.sum() + shape.fixed.sum())
        if self.option == SIZE:
            return held - self.memory[0]
        held += float(shape.cache(work).sum())
        copied = float(shape.tied)
        if EMBEDDING in shape.modules and self.tied:
            copied = float(linears[shape.modules.index(EMBEDDING)])
        # Each device has buffers: as few are taken as do, the largest ones.
        memory = np.cumsum(sorted(self.memory, reverse=True))
        used = np.arange(1, len(memory) + 1)
        return float((held + used * shape.buffers(work) + (used > 1) * copied - memory).min())

    def _remedies(self, missing: float) -> list[str]:
        """What would do, each by itself."""
        shape, work = self.shape, self.work
        if self.option == CLUSTER:
            found = ["more devices or memory in `cluster`"]
        else:
            found = [f"{self.option} {_given(self.memory[0] + missing)}"]
        if self._missing(self._of_one_bit(), work) <= 0:
            found.append("fewer bits in `bits`" + (" and `fixed`" if self.is_fixed else ""))
        least = Workload(1, 1, 1)
        linears = self._fewest(shape.held(len(self.memory)))
        if self.option != SIZE and self._missing(linears, least) <= 0:
            counts = {"`batch`": work.batch, "`prompt`": work.prompt, "`new`": work.new}
            found.append(f"a smaller {_either([name for name, n in counts.items() if n > 1])}")
        outer = [] if self.tied and LM_HEAD in shape.modules else [(EMBEDDING, "`embedding`")]
        if not self.tied:
            outer.append((LM_HEAD, "`lm_head`"))
        fewest = min(spec.bits for spec in self.candidates if not spec.kind.startswith("w8a8"))
        weights = shape.config.vocab_size * shape.config.embed_size
        saved = weights * (shape.dtype.itemsize - fewest / 8)
        found += [option for name, option in outer if name not in shape.modules and missing < saved]
        return found

    def _of_one_bit(self) -> Array:
        """Bytes (M,) of modules with the fewest bits that there are."""
        shape = self.shape
        bias = shape.nbytes[:, 0] - shape.weights * shape.bits[:, 0] / 8
        linear = linear_class(ONE_BIT)
        held = [
            linear.empty(inputs, outputs, False, ONE_BIT, shape.dtype).nbytes()
            for inputs, outputs in shape.sizes.tolist()
        ]
        return bias + shape.counts * held


def rounded_up(value: float) -> str:
    """A number above 0 in three digits, which are no less: "0.00123"."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit) * unit:.3g}"


def _text(nbytes: float) -> str:
    """Bytes in a unit that shows them: "12.34 MB"."""
    if nbytes < UNITS["KB"]:
        return f"{nbytes:.0f} bytes"
    unit = _unit(nbytes)
    return f"{nbytes / UNITS[unit]:.2f} {unit}"


def _given(nbytes: float) -> str:
    """Bytes as an option takes them, and no fewer: "12.35MB"."""
    unit = _unit(nbytes)
    return f"{math.ceil(100 * nbytes / UNITS[unit]) / 100:.2f}{unit}"


def _unit(nbytes: float) -> str:
    return next((unit for unit in reversed(UNITS) if UNITS[unit] <= nbytes), "KB")


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
