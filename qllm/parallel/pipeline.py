"""Which layers go into which stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf

from qllm.errors import UserError


def balance(costs: Sequence[int], parts: int) -> list[range]:
    """Split layers into contiguous ranges of about equal costs.

    The largest sum of a range is as small as it can be; among the splits that have it, the sum of
    squares is, so that one large layer (the embedding counts with the first) leaves the others
    balanced among themselves.

    Args:
        costs: of each layer, 0 or more.
        parts: how many ranges, each with at least one layer.

    Raises:
        UserError: for fewer than 1 part, or more than there are layers.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise UserError(f"{parts} shards cannot share {count} layers; give 1 to {count}")
    sums = [0, *accumulate(costs)]
    limit = _smallest_limit(costs, parts)
    # best[end]: the smallest sum of squares of the first `end` layers in the parts so far.
    best: list[float] = [0, *[inf] * count]
    begins: list[list[int]] = []
    for _ in range(parts):
        new, begun = [inf] * (count + 1), [0] * (count + 1)
        for end in range(1, count + 1):
            for begin in range(end - 1, -1, -1):
                cost = sums[end] - sums[begin]
                if cost > limit:
                    break
                if best[begin] + cost**2 < new[end]:
                    new[end], begun[end] = best[begin] + cost**2, begin
        best = new
        begins.append(begun)
    ranges, end = [], count
    for begun in reversed(begins):
        ranges.append(range(begun[end], end))
        end = begun[end]
    return ranges[::-1]


def _smallest_limit(costs: Sequence[int], parts: int) -> int:
    """The smallest bound that the costs of `parts` contiguous ranges can keep to."""

    def needed(limit: int) -> int:
        """How many ranges it takes when each is filled as far as it goes."""
        ranges, filled = 1, 0
        for cost in costs:
            if filled + cost > limit:
                ranges, filled = ranges + 1, 0
            filled += cost
        return ranges

    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= parts else (middle + 1, high)
    return low
