"""The mixed-integer program that picks bits and stages, solved by HiGHS.

Binary x[m, c] gives linear m candidate c, binary y[h, d] puts half h of a layer on device d. Of a
linear z[m, c, d] is the part that candidate c has on device d; with x and y whole, sums over c and
over d leave z no choice but their product. Stages are contiguous where, for each device d, the
halves on the devices up to d only become fewer from half to half.

HiGHS proves small programs. Of a large one it solves the relaxation, which bounds how good a plan
can be and says how much each device should take; stages are cut there, the bits of those stages are
a small program again, and cuts are moved as long as that helps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qllm.errors import UserError

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
OBJECTIVES = ("loss", "bytes", "latency", "throughput")
GAP = 1e-4  # relative, at which a solution is as good as the best
SMALL = 2500  # variables of a program that is solved whole
MOST_ORDERS = 6
LEFT = 10.0  # seconds that the search of cuts leaves to the bits
# HiGHS holds constraints to about this much of a number around 1.
TOLERANCE = 1e-6


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


def solve(problem: Problem, time_limit: float = 60.0) -> Solution:
    """The best choice.

    Raises:
        UserError: no choice keeps to the limits; or none was found in time.
    """
    start = time.perf_counter()
    _check_possible(problem)
    linears, candidates = problem.loss.shape
    if len(problem.memory) == 1:
        alone = np.zeros(len(problem.fixed_bytes), dtype=np.int64)
        found = _solve_stages(problem, alone, time_limit)
    elif linears * candidates * len(problem.memory) <= SMALL:
        found = _solve_whole(problem, time_limit)
    else:
        found = _search(problem, start + time_limit)
    return replace(found, seconds=time.perf_counter() - start)


def _solve_whole(problem: Problem, time_limit: float) -> Solution:
    """Bits and stages in one program."""
    program = _Program(problem)
    return program.solution(program.run(time_limit))


def _solve_stages(problem: Problem, device: Whole, time_limit: float) -> Solution:
    """Bits alone, for halves that are where they are."""
    program = _Program(problem, device)
    return program.solution(program.run(time_limit))


def _search(problem: Problem, deadline: float) -> Solution:
    """Cuts by the relaxation of the whole or of uniform bits, whichever are better, then moved.

    It is never worse than uniform bits with the stages that are best for them; the gap is to the
    relaxation's bound.
    """
    relaxed = _Program(problem).run(deadline - time.perf_counter(), whole=False)
    shares = np.cumsum(relaxed.y.sum(axis=0))[:-1]  # halves on the devices up to each
    cuts = tuple(round(share) for share in shares)
    tried: dict[tuple[int, ...], float] = {}

    def value(cuts: tuple[int, ...]) -> float:
        """Of the relaxation of the bits, which takes a fraction of their program's time."""
        if cuts not in tried:
            device = _device_of_half(cuts, problem)
            try:
                left = deadline - time.perf_counter()
                tried[cuts] = _Program(problem, device).run(left, whole=False).bound
            except UserError:
                tried[cuts] = np.inf
        return tried[cuts]

    uniform = _uniform(problem, deadline)
    starts = [cuts, *(_cuts(each.device, problem) for each in uniform)]
    best, step = min(starts, key=value), 4
    while step:
        # A third of the time is left to the program of the bits.
        moved = [
            tuple(sorted((*best[:i], min(max(cut + way, 0), problem.halves), *best[i + 1 :])))
            for i, cut in enumerate(best)
            for way in (-step, step)
        ]
        better = min(
            (m for m in moved if time.perf_counter() < deadline - LEFT), key=value, default=best
        )
        if value(better) < value(best) * (1 - GAP):
            best = better
        else:
            step //= 2
    try:
        left = max(LEFT, deadline - time.perf_counter())
        uniform.append(_solve_stages(problem, _device_of_half(best, problem), left))
    except UserError:
        if not uniform:
            raise
    found = min(uniform, key=lambda each: each.value)
    bound = relaxed.bound
    return replace(found, gap=max(found.gap, 1 - bound / found.value if found.value else 0.0))


def _uniform(problem: Problem, deadline: float) -> list[Solution]:
    """Each candidate for all linears, where that keeps to the limits, in the best stages for it."""
    found = []
    for candidate in range(problem.loss.shape[1]):
        alone = np.zeros(problem.loss.shape, dtype=bool)
        alone[:, candidate] = True
        if problem.allowed is not None and (alone & ~problem.allowed).any():
            continue
        # What the limits say of it is plain, and near to one they are no question for HiGHS.
        free = replace(problem, allowed=alone, max_loss=None, max_bits=None)
        try:
            each = _solve_whole(free, max(1.0, deadline - LEFT - time.perf_counter()))
        except UserError:
            continue
        if problem.keeps_to_limits(each.costs):
            found.append(each)
    return found


def _cuts(device: Whole, problem: Problem) -> tuple[int, ...]:
    """The inverse of `_device_of_half`."""
    return tuple(int(c) for c in np.searchsorted(device, np.arange(1, len(problem.memory))))


def _device_of_half(cuts: Sequence[int], problem: Problem) -> Whole:
    """The device of each half, where each but the first begins at a cut."""
    return np.searchsorted(np.asarray(cuts), np.arange(problem.halves), side="right")


def orders(kinds: Sequence[object]) -> list[tuple[int, ...]]:
    """Orders in which unlike devices may follow one another; alike ones are not told apart.

    All of them where they are few; else as given, its reverse, and by kind.
    """
    seen: dict[tuple[object, ...], tuple[int, ...]] = {}
    count = len(kinds)
    distinct = dict.fromkeys(kinds)
    many = len(distinct) > 1 and count > 6
    given = tuple(range(count))
    by_kind = tuple(sorted(given, key=lambda i: list(distinct).index(kinds[i])))
    tried = [given, given[::-1], by_kind, by_kind[::-1]] if many else itertools.permutations(given)
    for order in tried:
        seen.setdefault(tuple(kinds[i] for i in order), order)
        if len(seen) == MOST_ORDERS:
            break
    return list(seen.values())


def _check_possible(problem: Problem) -> None:
    """Refuse, with the numbers, limits that even the smallest choice breaks."""
    from qllm.memory import gigabytes

    least = problem.nbytes.min(axis=1).sum() + problem.fixed_bytes.sum() + problem.buffers
    memory = float(problem.memory.sum())
    if least > memory:
        raise UserError(
            f"nothing fits: the fewest bits take {gigabytes(int(least))} of memory and there are "
            f"{gigabytes(int(memory))}, {gigabytes(int(least - memory))} are missing; take fewer "
            "--bits, a smaller --batch, --prompt or --gen, or more devices"
        )
    fewest = (problem.weights * problem.bits.min(axis=1)).sum() / problem.weights.sum()
    if problem.max_bits is not None and fewest > problem.max_bits + TOLERANCE:
        raise UserError(
            f"--avg-bits {problem.max_bits:g} is below the fewest of --bits, {fewest:.4g} with "
            "their scales and zeros"
        )


@dataclass(frozen=True, eq=False)
class _Result:
    """What HiGHS says: x (M, C), y (H, D), and a bound that no solution is better than."""

    x: Array
    y: Array
    bound: float


class _Program:
    """The matrices of one problem, with its numbers scaled to about 1.

    Variables: x (M, C); y (H, D); z (M, C, D); used (D,); the slowest prefill, and the slowest
    step. Where the halves' devices are given, y and z are constants and only x and the last two
    are there.
    """

    def __init__(self, problem: Problem, device: Whole | None = None) -> None:
        self.problem, self.device = problem, device
        m, c, d, h = self.sizes = (*problem.loss.shape, len(problem.memory), problem.halves)
        self.x = np.arange(m * c).reshape(m, c)
        count = self.x.size
        if device is None:
            self.y = count + np.arange(h * d).reshape(h, d)
            self.z = count + h * d + np.arange(m * c * d).reshape(m, c, d)
            self.used = count + h * d + m * c * d + np.arange(d)
            count += h * d + m * c * d + d
        self.slow = count + np.arange(2)
        self.count = count + 2
        self.parts: list[tuple[Array, Whole, Whole]] = []  # values, rows and columns
        self.low: list[Array] = []
        self.high: list[Array] = []
        self.rows = 0
        self.cost = np.zeros(self.count)
        self.constant = 0.0
        self._choose()
        if device is None:
            self._place()
        self._limits()
        self._set_cost()

    def _add(self, columns: Whole, values: float | Array, low: float, high: float) -> None:
        """Rows, one for each of `columns` (R, V)."""
        columns = np.atleast_2d(columns)
        count = len(columns)
        rows = np.repeat(np.arange(self.rows, self.rows + count), columns.shape[1])
        values = np.broadcast_to(np.asarray(values, dtype=np.float64), columns.shape)
        self.parts.append((values.ravel(), rows, columns.ravel()))
        self.low.append(np.full(count, low))
        self.high.append(np.full(count, high))
        self.rows += count

    def _choose(self) -> None:
        self._add(self.x, 1.0, 1, 1)

    def _place(self) -> None:
        m, c, d, h = self.sizes
        all_devices = self.z.reshape(m * c, d)
        columns = np.concatenate([all_devices, self.x.reshape(-1, 1)], axis=1)
        self._add(columns, np.array([1.0] * d + [-1.0]), 0, 0)
        all_candidates = self.z.transpose(0, 2, 1).reshape(m * d, c)
        there = self.y[self.problem.half_of].reshape(-1, 1)
        columns = np.concatenate([all_candidates, there], axis=1)
        self._add(columns, np.array([1.0] * c + [-1.0]), 0, 0)
        self._add(self.y, 1.0, 1, 1)
        columns = np.stack([np.broadcast_to(self.used, (h, d)), self.y], axis=-1).reshape(-1, 2)
        self._add(columns, np.array([1.0, -1.0]), 0, np.inf)
        for last in range(d - 1):
            columns = np.concatenate([self.y[:-1, : last + 1], self.y[1:, : last + 1]], axis=1)
            values = np.array([1.0] * (last + 1) + [-1.0] * (last + 1))
            self._add(columns, values, 0, np.inf)

    def _on_device(self, d: int, linear: Array, half: Array) -> tuple[Whole, Array, float]:
        """A sum over what is on a device, as columns, values and a constant.

        Args:
            linear: (M, C).
            half: (H,).
        """
        if self.device is None:
            columns = np.concatenate([self.z[:, :, d].ravel(), self.y[:, d]])
            return columns, np.concatenate([linear.ravel(), half]), 0.0
        here = self.device[self.problem.half_of] == d
        constant = float(half[self.device == d].sum())
        return self.x[here].ravel(), linear[here].ravel(), constant

    def _limits(self) -> None:
        p = self.problem
        scale = max(float(p.nbytes.max()), 1.0)
        for d, memory in enumerate(p.memory):
            if np.isfinite(memory):
                columns, values, constant = self._on_device(d, p.nbytes, p.fixed_bytes)
                if self.device is None:
                    columns = np.append(columns, self.used[d])
                    values = np.append(values, p.buffers)
                elif (self.device == d).any():
                    constant += p.buffers
                self._add(columns, values / scale, -np.inf, (memory - constant) / scale)
            for place, (linear, half) in enumerate(
                ((p.prefill, p.fixed_prefill), (p.decode, p.fixed_decode))
            ):
                columns, values, constant = self._on_device(d, linear[d], half[d])
                columns = np.append(columns, self.slow[place])
                unit = self._unit(place)
                values = np.append(values / unit, -1.0)
                self._add(columns, values, -np.inf, -constant / unit)
        if p.max_loss is not None:
            # A little less than the limit, so that rounding inside HiGHS does not break it.
            self._add(self.x.ravel(), p.loss.ravel() / p.max_loss, -np.inf, 1 - TOLERANCE)
        if p.max_bits is not None:
            share = p.weights[:, None] * p.bits / (p.weights.sum() * p.max_bits)
            self._add(self.x.ravel(), share.ravel(), -np.inf, 1 + TOLERANCE / 100)

    def _unit(self, place: int) -> float:
        """Seconds that stand for 1: of prefill, of a step."""
        p = self.problem
        part = (p.prefill, p.decode)[place].max(axis=(0, 2)).sum()
        rest = (p.fixed_prefill, p.fixed_decode)[place].max(axis=0).sum()
        return float(part + rest) or 1.0

    def _set_cost(self) -> None:
        p, cost = self.problem, self.cost
        if p.objective in ("loss", "bytes"):
            cost[self.x] = p.loss if p.objective == "loss" else p.nbytes
            return
        more = p.micro_batches - 1 if p.objective == "latency" else p.micro_batches
        cost[self.slow] = self._unit(0) * more, self._unit(1) * more * p.steps
        if p.objective == "throughput":
            return
        for d in range(len(p.memory)):
            total = p.prefill[d] + p.steps * p.decode[d]
            half = p.fixed_prefill[d] + p.steps * p.fixed_decode[d]
            columns, values, constant = self._on_device(d, total, half)
            cost[columns] = values
            self.constant += constant
        hop = p.hop_prefill + p.steps * p.hop_decode
        if self.device is None:
            cost[self.used] = hop
            self.constant -= hop  # one less than there are stages
        else:
            self.constant += hop * (len(np.unique(self.device)) - 1)

    def run(self, time_limit: float, *, whole: bool = True) -> _Result:
        """Solve it; or its relaxation, where variables need not be whole.

        Raises:
            UserError: nothing keeps to the limits, or nothing was found in time.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        values, rows, columns = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        matrix = coo_array((values, (rows, columns)), shape=(self.rows, self.count)).tocsr()
        integral, high = np.zeros(self.count), np.ones(self.count)
        high[self.slow] = np.inf
        if self.problem.allowed is not None:
            high[self.x] = self.problem.allowed
        if whole:
            integral[self.x] = 1
            if self.device is None:
                integral[self.y] = 1
        unit = float(np.abs(self.cost).max()) or 1.0
        limits = LinearConstraint(matrix, np.concatenate(self.low), np.concatenate(self.high))
        result = milp(
            self.cost / unit,
            constraints=limits,
            integrality=integral,
            bounds=Bounds(np.zeros(self.count), high),
            options={"time_limit": max(time_limit, 1.0), "mip_rel_gap": GAP},
        )
        if result.x is None:
            if result.status == 1:
                raise UserError(
                    f"no plan was found in {time_limit:.0f} s; give more with --time-limit"
                )
            raise UserError(
                "no plan keeps to all limits at once; allow more --max-kl or --memory, or name "
                "fewer bits in --bits"
            )
        bound = result.mip_dual_bound if whole else result.fun
        y = np.zeros((0, 0)) if self.device is not None else result.x[self.y]
        return _Result(result.x[self.x], y, bound * unit + self.constant)

    def solution(self, result: _Result) -> Solution:
        """The choice that a result stands for."""
        device = result.y.argmax(axis=1) if self.device is None else self.device
        choice = result.x.argmax(axis=1)
        costs = self.problem.evaluate(choice, device)
        value = self.problem.value(costs)
        gap = max(1 - result.bound / value, 0.0) if value else 0.0
        return Solution(choice, device, costs, value, gap, 0.0)
