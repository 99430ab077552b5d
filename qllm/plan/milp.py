"""The mixed-integer program of a problem: its variables, rows and costs, as HiGHS takes them.

Binary x[m, c] gives linear m candidate c, binary y[h, d] puts half h of a layer on device d. Of a
linear z[m, c, d] is the part that candidate c has on device d; with x and y whole, sums over c and
over d leave z no choice but their product. Stages are contiguous where, for each device d, the
halves on the devices up to d only become fewer from half to half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qllm.plan.problem import Array, Problem, Solution, UnsolvedError, Whole, two_fit
from qllm.plan.silence import without_output

GAP = 1e-4  # relative, at which a solution is as good as the best
# HiGHS holds constraints to about this much of a number around 1.
TOLERANCE = 1e-6
OUT_OF_TIME = 1  # of its states


@dataclass(frozen=True, eq=False)
class Result:
    """What HiGHS says: x (M, C), y (H, D), and a bound that no solution is better than."""

    x: Array
    y: Array
    bound: float


class MixedIntegerProgram:
    """The matrices of one problem, with its numbers scaled to about 1.

    Variables: x (M, C); y (H, D); z (M, C, D); which of `Problem.copies` each device has; used
    (D,); for each device whether its stage is in a crowd; for each machine whether its stages have
    more threads than it has processors, and whether there are three or more; the slowest prefill,
    the slowest step, and the time of a step. Where the halves' devices are given, only x and the
    last three are there and the others constants.

    Where one device that has all takes other seconds than a stage does, there are two stages or
    more: each device by itself is another program.

    Args:
        margin: share of the limits of memory and loss that is left, so that rounding inside HiGHS
            does not break them.
    """

    def __init__(
        self, problem: Problem, device: Whole | None = None, *, margin: float = 0.0
    ) -> None:
        self.problem, self.device, self.margin = problem, device, margin
        m, c, d, h = self.sizes = (*problem.loss.shape, len(problem.memory), problem.halves)
        self.x = np.arange(m * c).reshape(m, c)
        count = self.x.size
        if device is None:
            self.y = count + np.arange(h * d).reshape(h, d)
            self.z = count + h * d + np.arange(m * c * d).reshape(m, c, d)
            count += h * d + m * c * d
            copies = len(problem.copies)
            self.copied = count + np.arange(copies * d).reshape(copies, d)
            count += self.copied.size
            self.used, self.in_crowd = count + np.arange(2 * d).reshape(2, d)
            machines = len(problem.shares)
            self.crowded, self.several = count + 2 * d + np.arange(2 * machines).reshape(2, -1)
            count += 2 * d + 2 * machines
        self.slow = count + np.arange(2)
        self.step = count + 2
        self.count = count + 3
        self.parts: list[tuple[Array, Whole, Whole]] = []  # values, rows and columns
        self.low: list[Array] = []
        self.high: list[Array] = []
        self.rows = 0
        self.cost = np.zeros(self.count)
        self.constant = 0.0
        self._choose()
        if device is None:
            self._assign()
        self._memory()
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

    def _assign(self) -> None:
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
        if self.problem.one_is_another:
            self._add(self.used, 1.0, 2, np.inf)
            columns = np.column_stack([self.used, self.y.T])
            self._add(columns, np.array([1.0] + [-1.0] * h), -np.inf, 0)
        if len(self.copied):
            # One is where the first half is and not the last, and of the candidate that is taken.
            columns = np.concatenate([self.copied, self.y[:1], self.y[-1:]]).T
            self._add(columns, np.array([1.0] * len(self.copied) + [-1.0, 1.0]), 0, np.inf)
            if self.problem.tied is not None:
                columns = np.column_stack([self.copied, self.x[self.problem.tied]])
                self._add(columns, np.array([1.0] * d + [-1.0]), -np.inf, 0)
        for last in range(d - 1):
            columns = np.concatenate([self.y[:-1, : last + 1], self.y[1:, : last + 1]], axis=1)
            values = np.array([1.0] * (last + 1) + [-1.0] * (last + 1))
            self._add(columns, values, 0, np.inf)
        for shares, crowded, several in zip(
            self.problem.shares, self.crowded, self.several, strict=True
        ):
            self._crowd(shares, crowded, several)

    def _crowd(self, shares: Array, crowded: int, several: int) -> None:
        """`Problem.is_crowded` of the stages of one machine."""
        there = np.flatnonzero(shares)
        for counted, most, more in ((shares[there], 1, crowded), (np.ones(len(there)), 2, several)):
            values = np.append(counted, -max(counted.sum() - most, 0.0))
            self._add(np.append(self.used[there], more), values, -np.inf, most)
        for d in there:
            if two_fit(shares[d]):
                columns = np.array([self.used[d], crowded, self.in_crowd[d]])
            else:
                columns = np.array([self.used[d], crowded, several, self.in_crowd[d]])
            values = np.append(np.ones(len(columns) - 1), -1.0)
            self._add(columns, values, -np.inf, len(columns) - 2)

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

    def _stage_seconds(
        self, d: int, phase: int, *, busy: bool = False
    ) -> tuple[Whole, Array, float]:
        """What the stage on a device takes of prompts (phase 0) or a step (1); see `_on_device`.

        Args:
            busy: while all stages work.
        """
        p = self.problem
        linear, half = ((p.prefill, p.fixed_prefill), (p.decode, p.fixed_decode))[phase]
        columns, values, constant = self._on_device(d, linear[d], half[d])
        if self.device is None:
            columns = np.append(columns, (self.used[d], self.in_crowd[d]))
            # As of several stages: for one alone there is `Problem.passes`.
            of_pass = p.stage_passes[phase, int(busy), d], p.crowding[phase, int(busy), d]
            values = np.append(values, of_pass)
            return columns, values, constant
        used = np.unique(self.device)
        if d in used:
            constant += p.beside_halves(used)[phase, int(busy), used == d].item()
        return columns, values, constant

    def _all_seconds(self, phase: int) -> tuple[Whole, Array, float]:
        """What all stages take one after another, and the way between them."""
        p = self.problem
        parts = [self._stage_seconds(d, phase) for d in range(len(p.memory))]
        hop = (p.hop_prefill, p.hop_decode)[phase]
        if self.device is None:  # one less than there are stages
            parts.append((self.used, np.full(len(p.memory), hop), -hop))
        else:
            none = np.zeros(0, dtype=np.int64), np.zeros(0)
            parts.append((*none, hop * (len(np.unique(self.device)) - 1)))
        return _joined(parts)

    def _memory(self) -> None:
        p = self.problem
        scale = max(float(p.nbytes.max()), 1.0)
        for d, memory in enumerate(p.memory):
            if np.isfinite(memory):
                columns, values, constant = self._on_device(d, p.nbytes, p.fixed_bytes)
                if self.device is None:
                    columns = np.append(columns, [self.used[d], *self.copied[:, d]])
                    values = np.append(values, [p.buffers, *p.copies])
                elif (self.device == d).any():
                    constant += p.buffers
                    if self.device[0] == d != self.device[-1]:
                        if p.tied is not None:
                            columns = np.append(columns, self.x[p.tied])
                            values = np.append(values, p.copies)
                        else:
                            constant += p.tied_bytes
                most = memory * (1 - self.margin) - constant
                self._add(columns, values / scale, -np.inf, most / scale)

    def _limits(self) -> None:
        p = self.problem
        steps = list(zip(p.decode, p.fixed_decode, strict=True))
        for phase in range(2):
            stages = [self._stage_seconds(d, phase, busy=True) for d in range(len(p.memory))]
            several = self.device is None or len(np.unique(self.device)) > 1
            contention = p.contention * (phase == 1 and several)
            halves = [self._on_device(d, *each) for d, each in enumerate(steps)]
            for d, (stage, factor) in enumerate(zip(stages, contention, strict=True)):
                # Who reads memory beside others waits as often as they read it.
                beside = [_times(factor, halves[other]) for other in np.flatnonzero(p.together[d])]
                parts = [stage, *beside] if factor else [stage]
                if self.device is None and factor:
                    # More than others can take, where there is no stage that waits for them.
                    most = factor * self._unit(1)
                    parts.append((self.used[d : d + 1], np.array([most]), -most))
                self._add_bound(_joined(parts), self.slow[phase], phase)
            for shares in p.shares:
                # While all stages work, processors that they share work for one at a time.
                parts = [_times(*each) for each in zip(shares, stages, strict=True)]
                parts += [_times(*each) for each in zip(shares * contention, halves, strict=True)]
                self._add_bound(_joined(parts), self.slow[phase], phase)
        if p.micro_batches > 1:
            self._add_bound(self._all_seconds(1), self.step, 1)
            columns = np.array([self.slow[1], self.step])
            self._add(columns, np.array([p.micro_batches, -1.0]), -np.inf, 0)
        if p.max_loss is not None:
            self._add(self.x.ravel(), p.loss.ravel() / p.max_loss, -np.inf, 1 - self.margin)
        if p.max_bits is not None:
            share = p.weights[:, None] * p.bits / (p.weights.sum() * p.max_bits)
            self._add(self.x.ravel(), share.ravel(), -np.inf, 1 + TOLERANCE / 100)

    def _add_bound(self, sum_of: tuple[Whole, Array, float], variable: int, phase: int) -> None:
        """A row by which a variable, in `_unit`, is at least a sum of seconds."""
        columns, values, constant = sum_of
        unit = self._unit(phase)
        self._add(
            np.append(columns, variable), np.append(values / unit, -1.0), -np.inf, -constant / unit
        )

    def _unit(self, phase: int) -> float:
        """Seconds that stand for 1: of prefill, of a step."""
        p = self.problem
        part = (p.prefill, p.decode)[phase].max(axis=(0, 2)).sum()
        rest = (p.fixed_prefill, p.fixed_decode)[phase].max(axis=0).sum()
        return float(part + rest) or 1.0

    def _set_cost(self) -> None:
        p, cost = self.problem, self.cost
        if p.objective in ("loss", "bytes"):
            cost[self.x] = p.loss if p.objective == "loss" else p.nbytes
            return
        if p.objective == "throughput":
            times = p.prompt_batches, p.steps * p.micro_batches
            cost[self.slow] = [self._unit(phase) * n for phase, n in enumerate(times)]
            return
        cost[self.slow[0]] = self._unit(0) * (p.prompt_batches - 1)
        self._add_cost(self._all_seconds(0), 1)
        if p.micro_batches > 1:
            cost[self.step] = self._unit(1) * p.steps
        else:
            self._add_cost(self._all_seconds(1), p.steps)

    def _add_cost(self, sum_of: tuple[Whole, Array, float], times: int) -> None:
        columns, values, constant = sum_of
        np.add.at(self.cost, columns, values * times)
        self.constant += constant * times

    def run(self, time_limit: float, *, whole: bool = True) -> Result:
        """Solve it; or its relaxation, where variables need not be whole.

        Raises:
            UnsolvedError: nothing keeps to the limits, or nothing was found in time.
        """
        if time_limit <= 0:
            raise UnsolvedError(in_time=False)
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        values, rows, columns = (np.concatenate(part) for part in zip(*self.parts, strict=True))
        matrix = coo_array((values, (rows, columns)), shape=(self.rows, self.count)).tocsr()
        integral, high = np.zeros(self.count), np.ones(self.count)
        high[[*self.slow, self.step]] = np.inf
        if self.problem.allowed is not None:
            high[self.x] = self.problem.allowed
        if whole:
            integral[self.x] = 1
            if self.device is None:
                integral[self.y] = integral[self.crowded] = integral[self.several] = 1
        unit = float(np.abs(self.cost).max()) or 1.0
        limits = LinearConstraint(matrix, np.concatenate(self.low), np.concatenate(self.high))
        with without_output():
            result = milp(
                self.cost / unit,
                constraints=limits,
                integrality=integral,
                bounds=Bounds(np.zeros(self.count), high),
                options={"time_limit": time_limit, "mip_rel_gap": GAP},
            )
        if result.x is None:
            raise UnsolvedError(in_time=result.status != OUT_OF_TIME)
        bound = result.mip_dual_bound if whole else result.fun
        y = np.zeros((0, 0)) if self.device is not None else result.x[self.y]
        return Result(result.x[self.x], y, bound * unit + self.constant)

    def solution(self, result: Result) -> Solution:
        """The choice that a result stands for."""
        device = result.y.argmax(axis=1) if self.device is None else self.device
        choice = result.x.argmax(axis=1)
        costs = self.problem.evaluate(choice, device)
        value = self.problem.value(costs)
        gap = max(1 - result.bound / value, 0.0) if value else 0.0
        return Solution(choice, device, costs, value, gap, 0.0)


def _times(factor: float, sum_of: tuple[Whole, Array, float]) -> tuple[Whole, Array, float]:
    columns, values, constant = sum_of
    return columns, factor * values, factor * constant


def _joined(parts: Sequence[tuple[Whole, Array, float]]) -> tuple[Whole, Array, float]:
    """The sum of some sums; see `MixedIntegerProgram._on_device`."""
    columns, values, constants = zip(*parts, strict=True)
    return np.concatenate(columns), np.concatenate(values), sum(constants)
