"""Fewer cases than a full product of axes has, where a fault lies in one value or in two."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest


def pairwise(*axes: Iterable) -> list[tuple]:
    """Cases with a value of every axis, such that any two values of two axes meet in one.

    For products whose cases see the same code. Where a fault needs three values to meet,
    `itertools.product` is what finds it. The same cases each time.
    """
    values = [tuple(axis) for axis in axes]
    candidates = [
        (case, frozenset(itertools.combinations(enumerate(case), 2)))
        for case in itertools.product(*(range(len(axis)) for axis in values))
    ]
    missing = set().union(*(pairs for _, pairs in candidates))
    cases = []
    while missing:
        case, pairs = max(candidates, key=lambda candidate: len(candidate[1] & missing))
        missing -= pairs
        cases.append(tuple(axis[i] for axis, i in zip(values, case, strict=True)))
    return cases


def each(*axes: Iterable) -> list[tuple]:
    """As many cases as the longest axis has values, all of which stand in some case."""
    values = [tuple(axis) for axis in axes]
    return [tuple(axis[i % len(axis)] for axis in values) for i in range(max(map(len, values)))]


def slow_but(kept: Iterable[tuple], *axes: Iterable) -> list:
    """All cases there are, of which those that are not kept are marked slow."""
    kept = list(kept)
    cases = [*itertools.product(*axes)]
    assert all(case in cases for case in kept)
    return [case if case in kept else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def mark_slow_but_covering(items: Sequence[pytest.Item]) -> None:
    """Of a test marked `covering(n)`, mark those cases slow that a cover can do without.

    In what is kept, any values of n of its parameters that meet in a case meet, as in `pairwise`,
    which is for parameters that stand in one list.
    """
    groups = defaultdict(list)
    for item in items:
        if (mark := item.get_closest_marker("covering")) and hasattr(item, "callspec"):
            groups[item.parent, item.originalname, mark.args[0]].append(item)
    for (*_, strength), cases in groups.items():
        random.Random(0).shuffle(cases)  # else the first values would meet all the others
        meeting = {
            item: frozenset(
                itertools.combinations(
                    [(name, id(value)) for name, value in item.callspec.params.items()], strength
                )
            )
            for item in cases
        }
        missing = set().union(*meeting.values())
        kept = set()
        while missing:
            best = max(cases, key=lambda item: len(meeting[item] & missing))
            missing -= meeting[best]
            kept.add(best)
        for item in cases:
            if item not in kept:
                item.add_marker(pytest.mark.slow)
