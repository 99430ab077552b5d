"""Bits and stages that there are to choose from, what each choice costs, and what was chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
OBJECTIVES = ("loss", "bytes", "latency", "throughput")


@dataclass(frozen=True, eq=False)
class Problem:
    """What there is to choose from, and what each choice costs.

    M linears with C candidates each lie in H halves of layers, which D devices take in order.

    Attributes:
        half_of: int (M,), the half that each linear is in; the LM head is in the last one.
        loss: (M, C), which adds up over linears.
        nbytes: (M, C).
        weights: (M,), elements.
        bits: (M, C), per weight, for `max_bits`.
        fixed_bytes: (H,), of what else a half has: norms, cache; of the first and the last one
            what is in front of the layers and behind them.
        memory: (D,), bytes; infinite where it does not matter.
        buffers: bytes on each device that has a part.
        prefill, decode: (D, M, C), seconds of a linear in a prompt's pass and in a step.
        fixed_prefill, fixed_decode: (D, H), of the rest of a half.
        hop_prefill, hop_decode: seconds between two stages.
        turn_prefill, turn_decode: (D,), seconds that a pass takes more on each of several stages.
        micro_batches: passes that a step takes through the stages.
        steps: tokens that are generated.
        objective: one of OBJECTIVES.
        allowed: bool (M, C), which candidates each linear may have; None: all.
        max_loss, max_bits: limits, of which the second is bits per weight; None: there is none.
    """

    half_of: Whole
    loss: Array
    nbytes: Array
    weights: Array
    bits: Array
    fixed_bytes: Array
    memory: Array
    buffers: float
    prefill: Array
    decode: Array
    fixed_prefill: Array
    fixed_decode: Array
    turn_prefill: Array
    turn_decode: Array
    hop_prefill: float = 0.0
    hop_decode: float = 0.0
    micro_batches: int = 1
    steps: int = 1
    objective: str = "loss"
    allowed: NDArray[np.bool_] | None = None
    max_loss: float | None = None
    max_bits: float | None = None

    @property
    def halves(self) -> int:
        return len(self.fixed_bytes)

    def evaluate(self, choice: Whole, device: Whole) -> Costs:
        """What a choice (M,) with its devices (H,) comes to."""
        rows = np.arange(len(choice))
        there = device[self.half_of]
        used = np.unique(device)
        held, first, step = (np.zeros(len(self.memory)) for _ in range(3))
        np.add.at(held, there, self.nbytes[rows, choice])
        np.add.at(held, device, self.fixed_bytes)
        np.add.at(first, there, self.prefill[there, rows, choice])
        np.add.at(first, device, self.fixed_prefill[device, np.arange(len(device))])
        np.add.at(step, there, self.decode[there, rows, choice])
        np.add.at(step, device, self.fixed_decode[device, np.arange(len(device))])
        hops = len(used) - 1
        if hops:
            first[used] += self.turn_prefill[used]
            step[used] += self.turn_decode[used]
        more = self.micro_batches - 1
        prefill = first.sum() + hops * self.hop_prefill + more * first.max()
        decode = step.sum() + hops * self.hop_decode + more * step.max()
        return Costs(
            loss=float(self.loss[rows, choice].sum()),
            nbytes=float(self.nbytes[rows, choice].sum()),
            bits=float((self.weights * self.bits[rows, choice]).sum() / self.weights.sum()),
            held=held + np.isin(np.arange(len(held)), used) * self.buffers,
            prefill=float(prefill),
            decode=float(decode),
            slowest=float(self.micro_batches * (first.max() + self.steps * step.max())),
        )

    def keeps_to_limits(self, costs: Costs) -> bool:
        """Whether costs are within `max_loss` and `max_bits`."""
        limits = ((costs.loss, self.max_loss), (costs.bits, self.max_bits))
        return all(limit is None or cost <= limit * (1 + 1e-12) for cost, limit in limits)

    def value(self, costs: Costs) -> float:
        """What the objective makes of costs."""
        if self.objective == "loss":
            return costs.loss
        if self.objective == "bytes":
            return costs.nbytes
        if self.objective == "latency":
            return costs.prefill + self.steps * costs.decode
        return costs.slowest


@dataclass(frozen=True, eq=False)
class Costs:
    """What a solution comes to.

    Attributes:
        bits: mean bits per weight.
        held: (D,), bytes on each device.
        prefill, decode: seconds of a prompt's pass of the whole batch, and of a step.
        slowest: seconds that the busiest stages work for a whole batch, prompt and steps.
    """

    loss: float
    nbytes: float
    bits: float
    held: Array
    prefill: float
    decode: float
    slowest: float


@dataclass(frozen=True, eq=False)
class Solution:
    """The best that was found.

    Attributes:
        choice: int (M,), the candidate of each linear.
        device: int (H,), the device of each half.
        gap: by which share of its value a better one could still be better; 0 where it is proved.
    """

    choice: Whole
    device: Whole
    costs: Costs
    value: float
    gap: float
    seconds: float
