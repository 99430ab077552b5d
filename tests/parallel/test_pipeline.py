"""balance against every possible split, and whether stages take turns."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import lost

from qllm.errors import UserError
from qllm.parallel.group import Group
from qllm.parallel.links import Links
from qllm.parallel.pipeline import PipelineStage, balance


def imbalance(costs: list[int], ranges: list[range]) -> tuple[int, int]:
    """The largest sum first, then how far the sums are from each other."""
    sums = [sum(costs[i] for i in part) for part in ranges]
    return max(sums), sum(value**2 for value in sums)


def splits(count: int, parts: int):
    """Every way to cut `count` layers into `parts` ranges, none of them empty."""
    for cuts in combinations(range(1, count), parts - 1):
        ends = [0, *cuts, count]
        yield [range(a, b) for a, b in pairwise(ends)]


def assert_partition(ranges: list[range], count: int, parts: int) -> None:
    assert len(ranges) == parts and all(len(part) > 0 for part in ranges)
    assert [i for part in ranges for i in part] == list(range(count))


@given(st.data())
def test_no_split_is_better(data):
    costs = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8), "costs")
    parts = data.draw(st.integers(1, len(costs)), "parts")
    ranges = balance(costs, parts)
    assert_partition(ranges, len(costs), parts)
    assert imbalance(costs, ranges) == min(imbalance(costs, s) for s in splits(len(costs), parts))


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ([5], 1, [range(1)]),
        ([1, 1, 1, 1], 2, [range(2), range(2, 4)]),
        ([1, 1, 1, 1], 4, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        # The embedding is counted with the first layer: that shard takes fewer layers.
        ([9, 3, 3, 3], 2, [range(1), range(1, 4)]),
        ([3, 3, 3, 9], 2, [range(3), range(3, 4)]),
        # It may be larger than all the others together, which share what is left.
        ([90, 1, 1, 1, 1], 3, [range(1), range(1, 3), range(3, 5)]),
    ],
)
def test_by_hand(costs, parts, expected):
    assert balance(costs, parts) == expected


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8, 70])
def test_seventy_layers_of_a_size(parts):
    ranges = balance([5_000_000_000] * 70, parts)
    assert_partition(ranges, 70, parts)
    assert max(len(part) for part in ranges) == -(-70 // parts)


def test_layers_without_cost_are_given_out_too():
    assert_partition(balance([0] * 6, 4), 6, 4)
    assert_partition(balance([0, 0, 7, 0, 0], 5), 5, 5)


@pytest.mark.parametrize(("count", "parts"), [(4, 0), (4, -1), (4, 5), (1, 2), (0, 1)])
def test_parts_that_cannot_be(count, parts):
    with pytest.raises(UserError, match=f"{parts} shards cannot share {count} layers"):
        balance([1] * count, parts)


def test_stages_of_one_rank_take_turns_with_one_row():
    links = Links({}, lost)
    stage, shared = (PipelineStage(Group((0, 1), 0, links), ranks) for ranks in (1, 2))
    assert stage.micro_batches(5) == [range(3), range(3, 5)] and not links.exclusive
    assert stage.micro_batches(1) == [range(1)] and links.exclusive
    assert shared.micro_batches(1) == [range(1)] and not links.exclusive
