"""The best choice of bits and stages, by mixed-integer programs.

HiGHS proves small programs. Of a large one it solves the relaxation, which bounds how good a plan
can be and says how much each device should take; stages are cut there, the bits of those stages are
a small program again, and cuts are moved as long as that helps. Where the time is too short for
either, there is the choice that was found before them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from qllm.plan.greedy import first_bits, first_solution
from qllm.plan.milp import GAP, TOLERANCE, MixedIntegerProgram
from qllm.plan.problem import Problem, Solution, UnsolvedError, Whole

SMALL = 2500  # variables of a program that is solved whole
MAX_ORDERS = 6


def solve(problem: Problem, time_limit: float = 60.0) -> Solution:
    """The best choice.

    Raises:
        UnsolvedError: no choice keeps to the limits; or none was found in time, which may be where
            two limits leave hardly any.
    """
    start = time.perf_counter()
    first = first_solution(problem)
    try:
        found = _proved(problem, start + time_limit, first)
    except UnsolvedError:
        if first is None:
            raise
        found = first
    if first is not None and first.value < found.value:
        found = _with_bound(first, found.value * (1 - found.gap))
    return replace(found, seconds=time.perf_counter() - start)


def _proved(problem: Problem, deadline: float, first: Solution | None) -> Solution:
    """The best that programs find, with a bound of what there may be.

    Args:
        first: a choice that keeps to the limits, if one is known.

    Raises:
        UnsolvedError: see `solve`.
    """
    linears, candidates = problem.loss.shape
    if len(problem.memory) == 1:
        return _solve_stages(problem, _all_on(0, problem), deadline - time.perf_counter())
    is_small = linears * candidates * len(problem.memory) <= SMALL
    found, failed = [], None
    try:
        if is_small:
            found.append(_solve_whole(problem, deadline - time.perf_counter()))
        else:
            found.append(_search(problem, deadline, first))
    except UnsolvedError as error:
        if not problem.one_is_another:
            raise
        failed = error
    found += _alone(problem, deadline)
    if failed is None:
        return _best(found)
    if not found:
        raise failed
    is_proved = is_small and failed.in_time  # that there are no stages
    return _best(found) if is_proved else _with_bound(_best(found), 0.0)


def _all_on(device: int, problem: Problem) -> Whole:
    """All halves on one device."""
    return np.full(problem.halves, device, dtype=np.int64)


def _alone(problem: Problem, deadline: float) -> list[Solution]:
    """All on one device, for each on which it fits, where the program of all leaves that out."""
    found: list[Solution] = []
    if not problem.one_is_another:
        return found
    for device in range(len(problem.memory)):
        with suppress(UnsolvedError):  # bits that fit need not keep to the other limits
            left = deadline - time.perf_counter()
            found.append(_solve_stages(problem, _all_on(device, problem), left))
    return found


def _best(found: Sequence[Solution]) -> Solution:
    """The best of some solutions, with the gap to the best that any of them could still be."""
    best = min(found, key=lambda each: each.value)
    return _with_bound(best, min(each.value * (1 - each.gap) for each in found))


def _with_bound(found: Solution, bound: float) -> Solution:
    """A solution with the gap to a value that none is better than."""
    return replace(found, gap=max(0.0, 1 - bound / found.value) if found.value else 0.0)


def _solve_whole(problem: Problem, time_limit: float) -> Solution:
    """Bits and stages in one program."""
    return _solve_program(problem, None, time_limit)


def _solve_stages(problem: Problem, device: Whole, time_limit: float) -> Solution:
    """Bits alone, for halves that are where they are."""
    try:
        return _solve_program(problem, device, time_limit)
    except UnsolvedError as error:
        first = None if error.in_time else first_bits(problem, device)
        if first is None:
            raise
        return first


def _solve_program(problem: Problem, device: Whole | None, time_limit: float) -> Solution:
    """One within the limits; HiGHS holds to them within a tolerance, so that a second one may be
    needed that stays below them."""
    deadline = time.perf_counter() + time_limit
    for margin in (0.0, TOLERANCE):
        program = MixedIntegerProgram(problem, device, margin=margin)
        found = program.solution(program.run(deadline - time.perf_counter()))
        if problem.keeps_to_limits(found.costs):
            return found
    raise UnsolvedError(in_time=True)


def _search(problem: Problem, deadline: float, first: Solution | None) -> Solution:
    """Cuts by the relaxation of the whole, of uniform bits or of `first`, the best, then moved.

    It is never worse than uniform bits with the stages that are best for them; the gap is to the
    relaxation's bound.
    """
    third = (deadline - time.perf_counter()) / 3
    relaxed = MixedIntegerProgram(problem).run(deadline - time.perf_counter(), whole=False)
    shares = np.cumsum(relaxed.y.sum(axis=0))[:-1]  # halves on the devices up to each
    cuts = tuple(round(share) for share in shares)
    tried: dict[tuple[int, ...], float] = {}

    def value(cuts: tuple[int, ...]) -> float:
        """Of the relaxation of the bits, which takes a fraction of their program's time."""
        if cuts not in tried:
            device = _device_of_half(cuts, problem)
            try:
                left = deadline - time.perf_counter()
                tried[cuts] = MixedIntegerProgram(problem, device).run(left, whole=False).bound
            except UnsolvedError:
                tried[cuts] = np.inf
        return tried[cuts]

    # A third of the time is for the first cuts, one for moving them, and one for the bits.
    uniform = _uniform(problem, deadline - 2 * third)
    known = uniform if first is None else [*uniform, first]
    starts = [cuts, *(_cuts(each.device, problem) for each in known)]
    best, step = min(starts, key=value), 4
    while step:
        # Some that follow one another together, so that stages between them stay as large.
        moved = [
            _moved(best, first, last, way, problem.halves)
            for first, last in itertools.combinations(range(len(best) + 1), 2)
            for way in (-step, step)
        ]
        better = min(
            (m for m in moved if time.perf_counter() < deadline - third), key=value, default=best
        )
        if value(better) < value(best) * (1 - GAP):
            best = better
        else:
            step //= 2
    try:
        device = _device_of_half(best, problem)
        uniform.append(_solve_stages(problem, device, max(third, deadline - time.perf_counter())))
    except UnsolvedError:
        if not uniform:
            raise
    found = min(uniform, key=lambda each: each.value)
    return _with_bound(found, relaxed.bound)


def _moved(cuts: tuple[int, ...], first: int, last: int, way: int, halves: int) -> tuple[int, ...]:
    """Cuts of which those from `first` on, up to `last`, are moved by some halves."""
    there = (min(max(cut + way, 0), halves) for cut in cuts[first:last])
    return tuple(sorted((*cuts[:first], *there, *cuts[last:])))


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
            each = _solve_whole(free, deadline - time.perf_counter())
        except UnsolvedError:
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
        if len(seen) == MAX_ORDERS:
            break
    return list(seen.values())
