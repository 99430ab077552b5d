"""Stages of a pipeline: which layers each has, and what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf

from torch import Tensor

from qllm.errors import UserError
from qllm.layers.sharding import split_evenly
from qllm.parallel.group import Group


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


def parse_cuts(text: str, num_layers: int, stages: int) -> tuple[int, ...]:
    """Where stages begin, by hand, in halves of layers: "2,3.5" is (4, 7).

    Args:
        text: the layer with which each stage but the first begins; 3.5 is the MLP of layer 3.

    Raises:
        UserError: for what is no such list, or leaves a stage empty.
    """
    try:
        halves = [float(word) * 2 for word in text.split(",")]
    except ValueError:
        halves = []
    cuts = (0, *halves, 2 * num_layers)
    rising = all(a < b for a, b in pairwise(cuts))
    if len(halves) != stages - 1 or not rising or any(half % 1 for half in halves):
        raise UserError(
            f"`stages` {text!r} does not say where stages 2 to {stages} of {num_layers} layers "
            "begin; give rising layers, such as 2,3.5, where .5 is the MLP of layer 3"
        )
    return tuple(int(half) for half in halves)


class PipelineStage:
    """One stage of a pipeline, and what it exchanges with the others.

    Attributes:
        index: of this stage; stages are numbered from 0 in the order in which they run.
        count: how many stages there are.
        first, last: whether this stage is the first one, or the last one.
    """

    def __init__(self, group: Group, ranks: int = 1) -> None:
        """
        Args:
            ranks: that share the layers of this stage.
        """
        self.group, self._alone = group, ranks == 1
        self.index, self.count = group.rank, group.size
        self.first, self.last = group.rank == 0, group.rank == group.size - 1

    def recv(self, x: Tensor) -> Tensor:
        """Receive from the previous stage into x (N, C), which is returned."""
        return self.group.recv(x, self.index - 1)

    def send(self, x: Tensor) -> None:
        """Send x (N, C) to the next stage."""
        self.group.send(x, self.index + 1)

    def broadcast(self, x: Tensor) -> Tensor:
        """The last stage's x on all stages; the others receive into the x that they give."""
        if not self.last:
            return self.group.recv(x, self.count - 1)
        for stage in range(self.count - 1):
            self.group.send(x, stage)
        return x

    def micro_batches(self, rows: int) -> list[range]:
        """Rows in as many runs as there are stages, which are then all busy at once.

        With a single run they take turns, until this is asked anew.
        """
        runs = split_evenly(rows, min(rows, self.count))
        self.group.links.exclusive = self._alone and len(runs) == 1
        return runs


class ParallelContext:
    """Which part of a model this process of several has.

    Attributes:
        tp: the ranks that share its layers.
        mode: of tensor parallelism, "exact" or "fast".
        stage: of a pipeline; None without one.
        cuts: the halves of layers with which stages begin; None: balanced by bytes.
    """

    def __init__(
        self,
        tp: Group | None = None,
        mode: str = "exact",
        pp: Group | None = None,
        cuts: tuple[int, ...] | None = None,
    ) -> None:
        self.tp, self.mode, self.cuts = tp or Group(), mode, cuts
        self.stage = PipelineStage(pp, self.tp.size) if pp is not None and pp.size > 1 else None

    def halves(self, costs: Sequence[int]) -> range:
        """The halves of layers of this stage; layer i has 2 i, its attention, and 2 i + 1.

        Args:
            costs: bytes of each layer, by which stages without cuts are balanced.

        Raises:
            UserError: there are more stages than layers.
        """
        index, count = (self.stage.index, self.stage.count) if self.stage else (0, 1)
        if self.cuts is None:
            if count > len(costs):
                raise UserError(
                    f"`pp` {count} is more than the model's {len(costs)} layers; give 1 to "
                    f"{len(costs)}, or `stages` that begin with MLPs, too"
                )
            layers = balance(costs, count)[index]
            return range(2 * layers.start, 2 * layers.stop)
        cuts = (0, *self.cuts, 2 * len(costs))
        return range(cuts[index], cuts[index + 1])
