"""A choice that keeps to the limits, found in a fraction of a second.

The solver may be stopped before it has found any: there is this one then, and no plan is worse.
Stages are cut where they are balanced, and bits go where they take most loss for what they cost.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qllm.plan.milp import TOLERANCE
from qllm.plan.problem import Array, Problem, Solution, Whole

HALVINGS = 50  # of an interval, after which balanced stages are as balanced as floats tell
TINY = 1e-100  # cost of a step that costs nothing or less


def first_solution(problem: Problem) -> Solution | None:
    """The best choice of those that are tried here; None where none keeps to the limits."""
    devices = {device.tobytes(): device for device in _stages(problem)}
    found = [first_bits(problem, device) for device in devices.values()]
    return min((each for each in found if each), key=lambda each: each.value, default=None)


def first_bits(problem: Problem, device: Whole) -> Solution | None:
    """The best choice of bits for halves (H,) that are on their devices."""
    allowed = _allowed(problem)
    seconds = (problem.prefill + problem.steps * problem.decode)[
        device[problem.half_of], np.arange(len(allowed))
    ]
    choices = [_upgraded(problem, device, cost) for cost in (problem.nbytes, seconds)]
    uniform = np.flatnonzero(allowed.all(axis=0))
    choices += [np.full(len(allowed), candidate) for candidate in uniform]
    found = []
    for choice in choices:
        costs = problem.evaluate(choice, device)
        if problem.keeps_to_limits(costs):
            # Every objective is 0 or more, and no other bound is known.
            found.append(Solution(choice, device, costs, problem.value(costs), 1.0, 0.0))
    return min(found, key=lambda each: each.value, default=None)


def _allowed(problem: Problem) -> np.ndarray:
    if problem.allowed is None:
        return np.ones(problem.loss.shape, dtype=bool)
    return problem.allowed


def _upgraded(problem: Problem, device: Whole, cost: Array) -> Whole:
    """The candidates (M,) of least cost, with upgrades by loss per cost as far as limits allow.

    Where loss is no objective, upgrades end where it keeps to its limit.

    Args:
        cost: (M, C), bytes or seconds.
    """
    cost = np.where(_allowed(problem), cost, np.inf)
    choice = cost.argmin(axis=1)
    there = device[problem.half_of]
    costs = problem.evaluate(choice, device)
    free = problem.memory - costs.held
    bits = problem.weights[:, None] * problem.bits / problem.weights.sum()
    spare = np.inf if problem.max_bits is None else problem.max_bits - costs.bits
    left = costs.loss - (problem.max_loss or 0.0) * (1 - TOLERANCE)
    blocked: set[int] = set()
    for _, m, before, after in _upgrades(cost, problem.loss):
        if problem.objective != "loss" and (problem.max_loss is None or left <= 0):
            break
        if m in blocked:
            continue
        grown = problem.nbytes[m, after] - problem.nbytes[m, before]
        wider = bits[m, after] - bits[m, before]
        holders = [there[m]]
        if m == problem.tied and device[0] != device[-1]:
            holders.append(device[0])
        if wider > spare or any(grown > free[d] for d in holders):
            blocked.add(m)
            continue
        choice[m] = after
        spare -= wider
        free[holders] -= grown
        left -= problem.loss[m, before] - problem.loss[m, after]
    return choice


def _upgrades(cost: Array, loss: Array) -> list[tuple[float, int, int, int]]:
    """Steps of each linear from its candidate of least cost to the one of least loss.

    They are between corners of the lower convex hull: each takes more loss for its cost than the
    next one does.

    Args:
        cost, loss: (M, C), where an infinite cost is no candidate.

    Returns:
        by the first of them: loss that a step adds by what it costs, the linear, and the candidates
        before and after it.
    """
    found: list[tuple[float, int, int, int]] = []
    rows = np.arange(len(cost))
    at = cost.argmin(axis=1)
    while len(rows):
        less = loss[rows] - loss[rows, at][:, None]
        more = np.maximum(cost[rows] - cost[rows, at][:, None], TINY)
        slopes = np.where((less < 0) & np.isfinite(more), less / more, np.inf)
        after = slopes.argmin(axis=1)
        slope = slopes[np.arange(len(rows)), after]
        columns = (slope, rows, at, after)
        found += zip(*(each.tolist() for each in columns), strict=True)
        goes_on = np.isfinite(slope)
        rows, at = rows[goes_on], after[goes_on]
    # The sort is stable, so that steps of one linear stay in their order where slopes are equal.
    return sorted((step for step in found if step[0] < 0), key=lambda step: step[0])


def _stages(problem: Problem) -> Iterator[Whole]:
    """Devices of the halves (H,): all on one, or balanced stages of the fewest or of equal bits."""
    for device in range(len(problem.memory)):
        yield np.full(problem.halves, device)
    if len(problem.memory) == 1:
        return
    smallest = np.where(_allowed(problem), problem.nbytes, np.inf).argmin(axis=1)
    linears = np.arange(len(smallest))
    uniform = (np.full(len(smallest), each) for each in range(problem.loss.shape[1]))
    linear_seconds = problem.prefill + problem.steps * problem.decode
    fixed_seconds = problem.fixed_prefill + problem.steps * problem.fixed_decode
    for choice in (smallest, *uniform):
        held = _by_half(problem, problem.nbytes[linears, choice][None]) + problem.fixed_bytes
        nbytes = np.broadcast_to(held, fixed_seconds.shape)
        seconds = _by_half(problem, linear_seconds[:, linears, choice]) + fixed_seconds
        for load in (nbytes / problem.memory[:, None], seconds):
            stages = _balanced(
                load, nbytes, problem.memory - problem.buffers, problem.copied_bytes(choice)
            )
            if stages is not None:
                yield stages


def _by_half(problem: Problem, linears: Array) -> Array:
    """Sums (D, H) over the linears (D, M) of each half."""
    found = np.zeros((len(linears), problem.halves))
    for row, each in zip(found, linears, strict=True):
        np.add.at(row, problem.half_of, each)
    return found


def _balanced(load: Array, nbytes: Array, memory: Array, copied: float) -> Whole | None:
    """Stages of which the most loaded has as little load as can be; None where none fit.

    Args:
        load, nbytes: (D, H), of each half on each device.
        memory: (D,), bytes of each device.
        copied: bytes that the first of several stages has besides.
    """
    low, high = 0.0, float(load.sum(axis=1).max())
    best = _filled(load, nbytes, memory, copied, np.inf)
    for _ in range(HALVINGS):
        if best is None:
            break
        middle = (low + high) / 2
        found = _filled(load, nbytes, memory, copied, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _filled(load: Array, nbytes: Array, memory: Array, copied: float, most: float) -> Whole | None:
    """Halves on one device after the other, as many as it takes; None where some are left."""
    count, halves = load.shape
    device = np.zeros(halves, dtype=np.int64)
    begin = 0
    for d in range(count):
        loads, held = load[d, begin:].cumsum(), nbytes[d, begin:].cumsum()
        if begin == 0:
            held += copied
        taken = int(((loads <= most) & (held <= memory[d])).sum())
        device[begin : begin + taken] = d
        begin += taken
    return device if begin == halves else None
