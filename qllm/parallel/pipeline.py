"""Which layers go into which stage."""

from __future__ import annotations

from collections.abc import Sequence

from qllm.errors import UserError


def balance(costs: Sequence[int], parts: int) -> list[range]:
    """Split layers into contiguous ranges whose largest sum of costs is smallest.

    Args:
        costs: of each layer, 0 or more.
        parts: how many ranges, each with at least one layer.

    Raises:
        UserError: for fewer than 1 part, or more than there are layers.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise UserError(f"{parts} shards cannot share {count} layers; give 1 to {count}")
    # best[i]: the smallest largest sum of the first i layers in the parts so far.
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = [float("inf")] * (count + 1)
    best[0] = 0
    starts: list[list[int]] = []
    for _ in range(parts):
        new, start = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(1, count + 1):
            for begin in range(end):
                largest = max(best[begin], sums[end] - sums[begin])
                if largest < new[end]:
                    new[end], start[end] = largest, begin
        best = new
        starts.append(start)
    ranges, end = [], count
    for start in reversed(starts):
        ranges.append(range(start[end], end))
        end = start[end]
    return ranges[::-1]
