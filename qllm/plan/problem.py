"""Bits and stages that there are to choose from, what each choice costs, and what was chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qllm.errors import UserError

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
OBJECTIVES = ("loss", "bytes", "latency", "throughput")
ROUNDING = 1e-9  # of shares that add up to 1


class UnsolvedError(UserError):
    """No choice keeps to the limits, or none was found in time."""

    def __init__(self, *, in_time: bool) -> None:
        super().__init__(
            "no plan keeps to all limits at once" if in_time else "no plan was found in time"
        )
        self.in_time = in_time


def two_fit(share: Array) -> NDArray[np.bool_]:
    """Whether a machine has processors for two stages with so many threads, by `Problem.shares`."""
    return np.asarray(share <= 0.5 + ROUNDING)


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
            what is in front of the layers and behind them; see `tied_bytes`.
        memory: (D,), bytes; infinite where it does not matter.
        buffers: bytes on each device that has a part.
        prefill, decode: (D, M, C), seconds of a linear in a prompt's pass and in a step.
        fixed_prefill, fixed_decode: (D, H), of the rest of a half.
        hop_prefill, hop_decode: seconds between two stages.
        passes: (2, D), seconds that prompts and a step take besides all halves on one device.
        stage_passes: (2, 2, D), those of each of several stages besides its own: of prompts and a
            step, while the other stages wait and while all of them work.
        crowding: (2, 2, D), the seconds on top of them in a crowd; see `is_crowded`.
        contention: (D,), of what the halves of other stages of its machine take in a step, the part
            by which those of a device take longer while both work.
        shares: (G, D), for each machine that several devices share, the part of its processors
            that a device has threads for, 1 at most; 0 for devices elsewhere.
        micro_batches: parts of the batch, which go through the stages one behind the other: while
            there are several, all stages work at the same time. The first is the largest; `prefill`
            is of it, and `decode` of a mean one.
        prompt_batches: how many times its prompts are those of the whole batch.
        steps: tokens that are generated.
        objective: one of OBJECTIVES.
        allowed: bool (M, C), which candidates each linear may have; None: all.
        max_loss, max_bits: limits, of which the second is bits per weight; None: there is none.
        tied: the linear in the last half whose matrix the device of the first half has as well, for
            rows are looked up in it there: an embedding that is the LM head. None: there is none.
        tied_bytes: of a matrix of that kind that is not decided on; it counts with the last half.
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
    passes: Array
    stage_passes: Array
    crowding: Array
    contention: Array
    shares: Array
    hop_prefill: float = 0.0
    hop_decode: float = 0.0
    micro_batches: int = 1
    prompt_batches: float = 1.0
    steps: int = 1
    objective: str = "loss"
    allowed: NDArray[np.bool_] | None = None
    max_loss: float | None = None
    max_bits: float | None = None
    tied: int | None = None
    tied_bytes: float = 0.0

    @property
    def copies(self) -> Array:
        """Bytes (C,), by the candidate of `tied`, that the first of several devices has besides.

        One number where there is no choice, and none where nothing is tied.
        """
        if self.tied is not None:
            return self.nbytes[self.tied]
        return np.array([self.tied_bytes] if self.tied_bytes else [])

    def copied_bytes(self, choice: Whole) -> float:
        """Bytes that the first of several devices has besides, with a choice (M,)."""
        if not len(self.copies):
            return 0.0
        return float(self.copies[0 if self.tied is None else choice[self.tied]])

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
        copied = 0.0
        if device[0] != device[-1]:
            copied = self.copied_bytes(choice)
            held[device[0]] += copied
        np.add.at(first, there, self.prefill[there, rows, choice])
        np.add.at(first, device, self.fixed_prefill[device, np.arange(len(device))])
        np.add.at(step, there, self.decode[there, rows, choice])
        np.add.at(step, device, self.fixed_decode[device, np.arange(len(device))])
        seconds = np.stack([first, step])[:, None].repeat(2, axis=1)
        hops = len(used) - 1
        # Who reads memory beside others waits as often as they read it.
        waits = self.contention * (self.together @ step) * bool(hops)
        contended = self.contention * step * bool(hops)
        seconds[..., used] += self.beside_halves(used)
        (first, busy_first), (step, busy_step) = seconds
        # While all stages work, processors that they share work for one at a time.
        slow_first = max([*busy_first, *(self.shares @ busy_first)])
        slow_step = max([*(busy_step + waits)[used], *(self.shares @ (busy_step + contended))])
        # The stages fill up once for a prompt. A step of one micro-batch begins when its last one
        # has ended, whatever the others are at.
        prefill = first.sum() + hops * self.hop_prefill + (self.prompt_batches - 1) * slow_first
        decode = step.sum() + hops * self.hop_decode
        if self.micro_batches > 1:  # else one stage works at a time
            decode = max(decode, self.micro_batches * slow_step)
        return Costs(
            loss=float(self.loss[rows, choice].sum()),
            nbytes=float(self.nbytes[rows, choice].sum()),
            bits=float((self.weights * self.bits[rows, choice]).sum() / self.weights.sum()),
            copied=copied,
            held=held + np.isin(np.arange(len(held)), used) * self.buffers,
            prefill=float(prefill),
            decode=float(decode),
            slowest=float(
                self.prompt_batches * slow_first + self.steps * self.micro_batches * slow_step
            ),
        )

    def beside_halves(self, used: Whole) -> Array:
        """Seconds (2, 2, U) of passes on the devices that are used, besides their halves."""
        if len(used) == 1:
            return self.passes[:, None, used].repeat(2, axis=1)
        return self.stage_passes[..., used] + self.crowding[..., used] * self.is_crowded(used)

    def is_crowded(self, used: Whole) -> NDArray[np.bool_]:
        """Of the devices that are used (U,): which have less of their machine than beside an equal.

        What a stage takes besides its layers is measured with two alike, and what it takes in a
        crowd with three. So stages of a machine are in one if they have more threads than it has
        processors; but of those that two alike would have too few for, three or more.
        """
        shares = self.shares[:, used]
        there = shares > 0
        crowded = shares.sum(axis=1, keepdims=True) > 1 + ROUNDING
        several = there.sum(axis=1, keepdims=True) > 2
        return (there & crowded & (two_fit(shares) | several)).any(axis=0)

    @property
    def together(self) -> NDArray[np.bool_]:
        """Of two devices (D, D), whether both are of a machine that is shared."""
        there = self.shares > 0
        return (there.T @ there) & ~np.eye(there.shape[1], dtype=bool)

    @property
    def one_is_another(self) -> bool:
        """Whether all on one device takes other seconds besides its halves than a stage does."""
        timed = self.objective in ("latency", "throughput") and len(self.memory) > 1
        of_passes = self.passes, self.stage_passes, self.crowding, self.contention
        return timed and any(bool(seconds.any()) for seconds in of_passes)

    def keeps_to_limits(self, costs: Costs) -> bool:
        """Whether costs are within `memory`, `max_loss` and `max_bits`."""
        limits = ((costs.loss, self.max_loss), (costs.bits, self.max_bits))
        within = all(limit is None or cost <= limit * (1 + 1e-12) for cost, limit in limits)
        return within and bool((costs.held <= self.memory).all())

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
        copied: bytes that the first device has of `Problem.copies`; `nbytes` is without them.
        held: (D,), bytes on each device.
        prefill, decode: seconds of a prompt's pass of the whole batch, and of a step.
        slowest: seconds that the busiest stage, or the processors that stages share, work for a
            whole batch, prompt and steps.
    """

    loss: float
    nbytes: float
    bits: float
    copied: float
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
        gap: by which share of its value a better one could still be better: 0 where it is proved,
            1 where nothing is known of that.
    """

    choice: Whole
    device: Whole
    costs: Costs
    value: float
    gap: float
    seconds: float
