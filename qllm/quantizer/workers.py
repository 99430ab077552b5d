"""Threads that put parts of a batch through a model, beside each other.

torch's own threads share each operation and wait for each other behind it. Gradients of small
layers are thousands of short operations a second, so that a third of the time goes there; a thread
that has a part of the samples to itself waits once a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from qllm import ops

Item = TypeVar("Item")
Result = TypeVar("Result")

# Each has sums of gradients of its own, as large as the weights.
MOST = 4
# Columns of a product that a sum is made of.
COLUMNS_AT_ONCE = 2048


class _Thread(threading.local):
    """A thread that knows its worker.

    Attributes:
        number: of the worker that this thread is; 0 elsewhere.
    """

    number = 0


_thread = _Thread()


def workers_on(device: torch.device) -> int:
    """How many workers there are at the most."""
    return min(MOST, torch.get_num_threads()) if device.type == "cpu" else 1


class Workers:
    """Some threads among which torch's are divided; on a GPU it is the thread that asks for them.

    Results are those of the same number of workers again, to the bit: which of them takes an item
    depends on its place alone.

    Attributes:
        count: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = workers_on(device)
        self._pools: list[ThreadPoolExecutor] = []

    @staticmethod
    def _begin(number: int, threads: int) -> None:
        _thread.number = number
        # A thread's first call sets what counts for all, so that it has to be over.
        torch.get_num_threads()
        torch.set_num_threads(threads)

    def __enter__(self) -> Self:
        """Start the threads."""
        threads = torch.get_num_threads()
        for number in range(self.count if self.count > 1 else 0):
            pool = ThreadPoolExecutor(1, "worker")
            self._pools.append(pool)
            pool.submit(self._begin, number, threads // self.count).result()
        # What a thread sets counts for those that start later as well.
        torch.set_num_threads(threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        self._pools = []

    def map(self, run: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """What `run` makes of each item, in their order.

        Modes such as `no_grad` are a thread's own: `run` has to enter those that it needs.
        """
        if not self._pools:
            return [run(item) for item in items]

        def share(number: int) -> list[Result]:
            return [run(item) for item in items[number :: self.count]]

        shares = [pool.submit(share, number) for number, pool in enumerate(self._pools)]
        found = [iter(each.result()) for each in shares]
        return [next(found[index % self.count]) for index in range(len(items))]

    def parts(self, count: int, most: int) -> int:
        """Into parts of how many each `count` samples are divided, at most so many in one."""
        return max(1, min(most, -(-count // self.count)))


class SharedSum:
    """A sum that workers add to: each to a part of its own, so that time never decides of its bits.

    Attributes:
        anchor: for autograd, which asks what a sum goes into for a gradient, and it has none.
    """

    def __init__(self, like: Tensor, workers: Workers) -> None:
        shape = (workers.count, *like.shape)
        self._parts = torch.empty(shape, dtype=like.dtype, device=like.device)
        self._begun = [False] * workers.count
        self.anchor = torch.empty(0, requires_grad=True)

    def add(self, x: Tensor) -> None:
        """Add to the part of the worker that asks."""
        part, begun = self._own()
        if begun:
            part.add_(x)
        else:
            part.copy_(x)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a b, of matrices."""
        if a.dtype == torch.float32:
            self.add(ops.multiply(a, b.t()))
            return
        part, begun = self._own()
        # oneDNN takes a tenth less time where nothing is added to, and for not too many columns.
        for columns in range(0, b.shape[1], COLUMNS_AT_ONCE):
            some = slice(columns, columns + COLUMNS_AT_ONCE)
            if begun:
                part[:, some].addmm_(a, b[:, some])
            else:
                torch.mm(a, b[:, some], out=part[:, some])

    def _own(self) -> tuple[Tensor, bool]:
        number = _thread.number
        begun, self._begun[number] = self._begun[number], True
        return self._parts[number], begun

    def take(self) -> Tensor:
        """The parts (P, …) of those that have added to it, which begin anew."""
        count = sum(self._begun)
        assert all(self._begun[:count])  # the first ones are those that have work
        self._begun = [False] * len(self._begun)
        return self._parts[:count]
