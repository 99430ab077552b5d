"""Collectives of the ranks that share a matrix: all_gather, all_reduce, send and recv."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from qllm.ops.cpu.capture import host_callback
from qllm.parallel.links import Links

# Up to this many bytes from each rank, a message is a matter of latency, which sockets have least
# of; more is torch.distributed's work.
SMALL = 1 << 18
INTEGERS = {2: torch.int16, 4: torch.int32}


class Group:
    """Some ranks of a run, in an order.

    Every result is the same to the bit on all of them, and does not depend on what is exchanged
    beside it: partial sums are added in the order of the ranks, in float32, and rounded once.

    Attributes:
        ranks: of all processes, those in the group.
        rank: the index of this process among them.
        size: how many there are.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (0,),
        rank: int = 0,
        links: Links | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.ranks, self.rank, self.size = tuple(ranks), rank, len(ranks)
        self._links, self.group = links, group

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """A group of one can be copied and pickled.

        Raises:
            TypeError: it is of several, which are the processes that they are.
        """
        if self.size > 1:
            raise TypeError(
                "a model that processes share cannot be copied or pickled; load it again instead"
            )
        return super().__reduce_ex__(protocol)

    @property
    def links(self) -> Links:
        """What this rank exchanges by; a group of one has none, and exchanges nothing."""
        assert self._links is not None
        return self._links

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """The columns of all ranks, side by side: x (M, widths[rank]) to (M, sum(widths))."""
        if self.size == 1:
            return x
        x = x.contiguous()
        out = x.new_empty(len(x), sum(widths))
        host_callback(self._collect(x, [out.narrow(1, *columns) for columns in columns_of(widths)]))
        return out

    def all_reduce(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The sum of all ranks' x (M, N), of one shape and type, and bias (N,)."""
        x = x.contiguous()
        out = torch.empty_like(x)
        if x.device.type != "cpu":
            out = x.clone()
            dist.all_reduce(out, group=self.group)
            return out if bias is None else out + bias
        if x.nbytes > SMALL:
            host_callback(lambda: self._sum_many(x, bias, out))
            return out
        parts = x.new_empty(self.size, *x.shape)
        collect = self._collect(x, list(parts))

        def run() -> None:
            collect()
            _add_up(parts, bias, out)

        host_callback(run)
        return out

    def all_reduce_or(self, x: Tensor, fill: Callable[[], None]) -> Tensor:
        """The bitwise or of all ranks' x, of which each element has bits on one rank at most.

        Args:
            fill: writes x; it is called each time that the exchange is made.
        """
        bits = x.view(INTEGERS[x.element_size()])
        parts, out = bits.new_empty(self.size, *bits.shape), torch.empty_like(bits)
        # Bytes, since NCCL knows no integers of 16 bits.
        collect = self._collect(bits.view(torch.uint8), list(parts.view(torch.uint8)))

        def run() -> None:
            fill()
            collect()
            torch.sum(parts, 0, dtype=out.dtype, out=out)

        host_callback(run)
        return out.view(x.dtype)

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is true on all ranks."""
        if self.size == 1:
            return flag
        mine = torch.tensor([[flag]], dtype=torch.uint8)
        return bool(self.all_gather(mine, [1] * self.size).all())

    def first(self, number: int) -> int:
        """The first rank's whole number, of up to 63 bits, on all ranks."""
        return int(self.all_gather(torch.tensor([[number]]), [1] * self.size)[0, 0])

    def send(self, x: Tensor, to: int) -> None:
        """Send x to a rank of the group, which knows its shape and type."""
        x = x.contiguous()
        if x.device.type != "cpu":
            dist.send(x, self.ranks[to], group=self.group)
            return
        data = view(x)
        host_callback(lambda: self.links.exchange([(self.ranks[to], data)], []))

    def recv(self, out: Tensor, source: int) -> Tensor:
        """Receive what a rank of the group sends into `out`, which is returned."""
        if out.device.type != "cpu":
            dist.recv(out, self.ranks[source], group=self.group)
            return out
        data = view(out)

        def run() -> None:
            self.links.exchange([], [(self.ranks[source], data)])

        host_callback(run)
        return out

    def _collect(self, x: Tensor, outs: list[Tensor]) -> Callable[[], None]:
        """A function that gathers each rank's x into `outs`."""
        largest = max(out.nbytes for out in outs)
        if x.device.type != "cpu" or largest > SMALL:
            return lambda: self._collect_many(x, outs)
        mine, data = outs[self.rank], view(x)
        others = [i for i in range(self.size) if i != self.rank]
        # Columns of several rows are not contiguous: they are received into a buffer first.
        received = {
            i: outs[i] if outs[i].is_contiguous() else x.new_empty(outs[i].shape) for i in others
        }
        copies = [(outs[i], received[i]) for i in others if received[i] is not outs[i]]
        send = [(self.ranks[i], data) for i in others]
        receive = [(self.ranks[i], view(received[i])) for i in others]

        def run() -> None:
            self.links.exchange(send, receive)
            mine.copy_(x)
            for out, buffer in copies:
                out.copy_(buffer)

        return run

    def _collect_many(self, x: Tensor, outs: list[Tensor]) -> None:
        """`_collect` by torch.distributed, which gathers tensors of one size."""
        largest = max(out.numel() for out in outs)
        flat = x.new_empty(largest)
        flat[: x.numel()] = x.reshape(-1)
        parts = x.new_empty(self.size, largest)
        with counted(self.links, flat.nbytes * (self.size - 1)):
            dist.all_gather_into_tensor(parts.view(-1), flat, group=self.group)
        for out, part in zip(outs, parts, strict=True):
            out.copy_(part[: out.numel()].view(out.shape))

    def _sum_many(self, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """`all_reduce` of many rows: a reduce-scatter by rows, then an all-gather of the sums."""
        rows = -(-len(x) // self.size)
        padded = x.new_zeros(self.size * rows, x.shape[1])
        padded[: len(x)] = x
        parts, sums = torch.empty_like(padded), torch.empty_like(padded)
        with counted(self.links, 2 * rows * x.shape[1] * x.element_size() * (self.size - 1)):
            dist.all_to_all_single(parts, padded, group=self.group)
            mine = x.new_empty(rows, x.shape[1])
            _add_up(parts.view(self.size, rows, -1), bias, mine)
            dist.all_gather_into_tensor(sums, mine, group=self.group)
        out.copy_(sums[: len(x)])


@contextmanager
def counted(links: Links, nbytes: int) -> Iterator[None]:
    """Count what torch.distributed sends among what the links send."""
    links.begin(nbytes)
    with links.waiting():
        yield
    links.end()


def columns_of(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Start and width of each rank's columns in their concatenation."""
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def view(x: Tensor) -> memoryview:
    """A tensor's bytes."""
    return x.view(-1).view(torch.uint8).numpy().data


def _add_up(parts: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """parts (n, M, N) summed in their order and with the bias (N,), in float32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    out.copy_(total if bias is None else total + bias)
