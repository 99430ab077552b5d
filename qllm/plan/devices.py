"""Devices that a model may lie on, and what a linear and the rest of a layer take there.

A device is either measured (`qllm.plan.probe`) or described by its published figures: memory,
bandwidth and rates. Of a described one a product takes the longer of reading its weights and
multiplying them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.plan.candidates import key

PHASES = ("decode", "prefill")
# What a stage is at: prompts and steps for which the other stages wait, or while all of them work;
# and what a step takes on top, for which the others wait, where caches keep nothing of it.
STAGE_PASSES = ("prefill", "busy_prefill", "decode", "busy_decode", "far_decode")
# What most kernels reach of what is published, of bandwidth and of arithmetic.
OF_BANDWIDTH, OF_FLOPS = 0.8, 0.5

Size = tuple[int, int]  # inputs and outputs of a matrix


class HalfWork(NamedTuple):
    """What there is to do in half a layer beside its products with matrices.

    Attributes:
        values: activations, tokens by channels.
        scores: of attention: tokens by heads by tokens that they see; 0 of an MLP.
        products: multiply-adds with keys: scores by the channels of a head.
        read: bytes of the cache that a step reads; 0 of prompts.
        heads: that they are of, of all tokens, each a stretch of memory; 0 of prompts.
    """

    values: float
    scores: float = 0.0
    products: float = 0.0
    read: float = 0.0
    heads: float = 0.0


class Speed(Protocol):
    """How long things take on a device, in seconds."""

    def linear(
        self, spec: QuantSpec, size: Size, nbytes: int, rows: float, *, decode: bool, model: float
    ) -> float:
        """A product with a matrix.

        Args:
            size, nbytes: of the matrix.
            rows: tokens that are multiplied, or their mean.
            decode: in a step of decode; else of prompts.
            model: bytes of all that a step reads, by which caches keep it or do not.
        """

    def half(self, work: HalfWork, *, decode: bool, model: float) -> float:
        """All else in half a layer; `decode` and `model` are as in `linear`."""

    def experts(self, read: float, values: float, *, decode: bool) -> float:
        """What experts of a layer take besides their products.

        Args:
            read: how many are called.
            values: that they take, tokens by channels.
        """

    def step(self, rows: float, *, decode: bool) -> float:
        """What a pass of some sequences takes besides its layers, of a device that has them all."""

    def logits(self, count: float, *, decode: bool) -> float:
        """What logits take besides the product with the LM head, all sequences' together."""

    def farness(self, model: float) -> float:
        """How little of so many bytes caches keep: 0 for all of them to 1 for none."""


@dataclass(frozen=True)
class DescribedSpeed:
    """Of published figures.

    Attributes:
        bandwidth: bytes per second.
        flops, int8_flops: operations per second, of 16-bit and of int8 products.
        overhead: seconds of half a layer beside its products.
    """

    bandwidth: float
    flops: float
    int8_flops: float
    overhead: float = 10e-6

    def linear(
        self, spec: QuantSpec, size: Size, nbytes: int, rows: float, *, decode: bool, model: float
    ) -> float:
        rate = self.int8_flops if spec.kind.startswith("w8a8") else self.flops
        read = nbytes / (self.bandwidth * OF_BANDWIDTH)
        return max(read, 2 * math.prod(size) * rows / (rate * OF_FLOPS))

    def half(self, work: HalfWork, *, decode: bool, model: float) -> float:
        # Activations are read and written a few times; scores are next to nothing beside products.
        moved = 8 * work.values + work.read
        return self.overhead + moved / (self.bandwidth * OF_BANDWIDTH)

    def experts(self, read: float, values: float, *, decode: bool) -> float:
        # Each is called by itself, as half a layer is.
        return self.overhead * read + 8 * values / (self.bandwidth * OF_BANDWIDTH)

    def step(self, rows: float, *, decode: bool) -> float:
        return 0.0

    def logits(self, count: float, *, decode: bool) -> float:
        return 8 * count / (self.bandwidth * OF_BANDWIDTH)  # float32, written and read

    def farness(self, model: float) -> float:
        return 1.0


@dataclass(frozen=True)
class MeasuredSpeed:
    """Of a probe on the machine itself.

    Attributes:
        linears: "decode" and "prefill" to `candidates.key` to rows to seconds per call, per
            channel (inputs and outputs together), and per weight in each of `working_sets`. Those
            of 16 bits and one row are among them.
        halves: "decode" and "prefill" to seconds per half of a layer, what a half takes on top
            where caches of the processor keep nothing of a step, and seconds per value, score and
            product of `HalfWork`.
        cache: seconds per byte of the cache that a step reads; and what a byte, and a head of it,
            take on top where caches of the processor keep none of it.
        passes: "decode" and "prefill" to seconds of a pass besides its layers, for each of its
            sequences, and for each of their logits.
        working_sets: rising, four or more; bytes that a step goes through, of which caches keep
            some. Between two, a weight's time goes by the logarithm.
        among_others: "decode" and "prefill" to the part by which products take longer in a model
            than by themselves: a step's, where caches keep none of it, and all of prompts.
        of_experts: seconds of an expert in a prompt's pass besides its products, and of each value
            that it takes: what `qllm.plan.probed_experts` measures. In steps they take next to
            nothing.
    """

    linears: Mapping[str, Mapping[str, Mapping[str, tuple[float, ...]]]]
    halves: Mapping[str, tuple[float, float, float, float, float]]
    cache: tuple[float, float, float]
    passes: Mapping[str, tuple[float, float, float]]
    working_sets: tuple[float, ...]
    among_others: Mapping[str, float]
    of_experts: tuple[float, float] = (0.0, 0.0)

    def linear(
        self, spec: QuantSpec, size: Size, nbytes: int, rows: float, *, decode: bool, model: float
    ) -> float:
        phase = self.linears["decode" if decode else "prefill"]
        if key(spec) not in phase:
            raise UserError(
                f"the probe measured {', '.join(phase)} and no {key(spec)}; measure again: "
                "`describe_machine` with the `bits`, `group_size` and `scheme` of the plan"
            )
        table = phase[key(spec)]
        known = sorted(map(int, table))
        seconds = []
        for call, channel, *weights in (table[str(count)] for count in known):
            weight = self._within(weights, model)
            seconds.append(call + channel * sum(size) + weight * math.prod(size))
        if rows > known[-1]:
            found = seconds[-1] * rows / known[-1]
        else:
            found = float(np.interp(rows, known, seconds))
        if decode:
            return found * (1 + self.farness(model) * self.among_others["decode"])
        return found * (1 + self.among_others["prefill"])

    def half(self, work: HalfWork, *, decode: bool, model: float) -> float:
        phase = "decode" if decode else "prefill"
        fixed, far_fixed, of_value, of_score, of_product = self.halves[phase]
        byte, far_byte, far_head = self.cache
        far = self.farness(model)
        seconds = fixed + far * far_fixed + of_value * work.values
        seconds += of_score * work.scores + of_product * work.products
        return seconds + (byte + far * far_byte) * work.read + far * far_head * work.heads

    def experts(self, read: float, values: float, *, decode: bool) -> float:
        of_expert, of_value = self.of_experts
        return 0.0 if decode else of_expert * read + of_value * values

    def step(self, rows: float, *, decode: bool) -> float:
        fixed, of_row, _ = self.passes["decode" if decode else "prefill"]
        return fixed + of_row * rows

    def logits(self, count: float, *, decode: bool) -> float:
        return self.passes["decode" if decode else "prefill"][2] * count

    def farness(self, model: float) -> float:
        """As `Speed` has it.

        By what a 16-bit weight takes: of one row, which reads more than it computes.
        """
        _, _, *weights = self.linears["decode"][key(QuantSpec())]["1"]
        _, near, *_, far = weights
        return (max(self._within(weights, model), near) - near) / max(far - near, 1e-30)

    def _within(self, seconds: Sequence[float], model: float) -> float:
        """Of what takes so long in each of `working_sets`, what it does in one of so many bytes."""
        return float(np.interp(math.log(max(model, 1.0)), np.log(self.working_sets), seconds))

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def no_seconds() -> dict[str, float]:
    return dict.fromkeys(STAGE_PASSES, 0.0)


@dataclass(frozen=True)
class Device:
    """One that can take a stage.

    Attributes:
        memory: bytes.
        kind: what makes devices alike.
        host, threads: the machine and the threads of a CPU that was probed; None of others.
        processors: of the host, which its devices share; None: it is not known.
        stage_passes: of each of STAGE_PASSES, seconds that a stage takes besides its layers, of one
            sequence; None: as many as one device that has them all.
        crowding: the seconds on top of them where stages have more threads than the host has
            processors, see `Problem.is_crowded`: then one that waits sleeps, and one that could go
            on may have no processor.
        contention: where none of what steps of one sequence read is in the host's caches, by which
            part of what another stage's layers take those of this one take longer while both work,
            1 at most.
    """

    name: str
    memory: float
    speed: Speed
    kind: str
    host: str | None = None
    threads: int | None = None
    processors: int | None = None
    stage_passes: Mapping[str, float] | None = None
    crowding: Mapping[str, float] = field(default_factory=no_seconds)
    contention: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Devices, and what joins them.

    Attributes:
        bandwidth: bits per second between two of them.
        latency: seconds from a send to the return of the receive.
    """

    devices: tuple[Device, ...]
    bandwidth: float = 10e9
    latency: float = 50e-6

    def hop(self, nbytes: float) -> float:
        """Seconds to hand so many bytes on."""
        return self.latency + nbytes * 8 / self.bandwidth
