"""Connections between the processes of a run: a socket for each pair of them.

A decode step exchanges a few kilobytes many times, and what counts there is the time that a message
takes to arrive. gloo hands each one to a thread of its own and back; a socket that the computing
thread itself writes to and reads from costs what the network costs.
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from qllm.cgroups import usable_cpus
from qllm.ops.cpu import library

if TYPE_CHECKING:
    from torch.distributed import Store

    from qllm.launch import Launch

HEADER = 64  # bytes with which a connection begins: who it is from
HEADER_SECONDS = 2.0
DIED = "its process has died"
POLL = 0.02  # seconds between two looks at the store
SEND_BUFFER = 4 << 20
# Seconds for which a rank looks for a message before it sleeps: most stages' part of a step takes
# less. And where others need its processor, about what waking up takes: who sleeps at once waits
# that long for every message, and who spins longer takes more from the others than that.
SPIN, CROWDED_SPIN = 0.002, 0.0001


def own_address(master: str) -> str:
    """The address by which this host reaches another, and others reach this one."""
    family, _, _, _, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


class Mesh:
    """A socket to every other rank.

    Attributes:
        sockets: by rank.
        address: this host's.
    """

    def __init__(self, store: Store, launch: Launch, deadline: float) -> None:
        """
        Args:
            deadline: of `time.monotonic()`, for all ranks to have come.

        Raises:
            RankError: a rank did not come in time.
        """
        rank, world, master = launch.rank, launch.world, launch.master
        self.address = own_address(master)
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        listener = socket.create_server((self.address, 0), family=family, backlog=world)
        port, secret = listener.getsockname()[1], secrets.token_hex(16)
        store.set(f"rank{rank}", f"{self.address} {port} {secret}")
        self.sockets: dict[int, socket.socket] = {}
        key = b""
        with listener, ExitStack() as on_error:
            on_error.callback(self.close)
            for other in range(world):
                words = _get(store, other, deadline)
                key = key or words[2].encode()  # rank 0's: who knows it, knows the store
                if other < rank:
                    self.sockets[other] = _connect(words[0], int(words[1]), other, deadline)
                    self.sockets[other].sendall((b"%s %d" % (key, rank)).ljust(HEADER))
            while len(self.sockets) < world - 1:
                listener.settimeout(_left(deadline))
                try:
                    link, _ = listener.accept()
                except TimeoutError:
                    missing = min(set(range(world)) - {rank, *self.sockets})
                    raise RankError(missing, "it did not connect") from None
                came = _header(link, deadline)
                if len(came) == 2 and hmac.compare_digest(came[0], key):
                    self.sockets[int(came[1])] = link
                else:
                    link.close()  # no rank of this run
            on_error.pop_all()
        for link in self.sockets.values():
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            link.setblocking(False)

    def close(self) -> None:
        for link in self.sockets.values():
            link.close()


class RankError(ConnectionError):
    """A rank did not come."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank, self.reason = rank, reason


def _header(link: socket.socket, deadline: float) -> list[bytes]:
    """The words with which a connection begins; none of one that is silent or breaks.

    Ranks send theirs at once. Whoever else connects holds the ranks up no longer than this.
    """
    link.settimeout(min(_left(deadline), HEADER_SECONDS))
    try:
        return link.recv(HEADER, socket.MSG_WAITALL).split()
    except OSError:
        return []


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())


def _connect(address: str, port: int, rank: int, deadline: float) -> socket.socket:
    try:
        return socket.create_connection((address, port), _left(deadline))
    except OSError as error:
        raise RankError(rank, f"it cannot be reached at {address} ({error})") from None


def _get(store: Store, rank: int, deadline: float) -> list[str]:
    """What a rank says of itself in the store."""
    key = f"rank{rank}"
    # The store's own `wait` would keep signals waiting, too, such as torchrun's that ends a rank.
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise RankError(rank, "it did not start")
        time.sleep(POLL)
    return store.get(key).decode().split()


def _reason(error: OSError) -> str:
    """What a broken connection says of the other side."""
    reset = isinstance(error, ConnectionResetError | BrokenPipeError)
    return DIED if reset else f"its connection broke ({error.strerror})"


def spin_seconds(threads: int) -> float:
    """For how long a rank looks for a message before it sleeps.

    A processor that sleeps takes long to come back, most of all a virtual one, and its threads with
    it. OMP_WAIT_POLICY=passive says that no rank is to spin.

    Args:
        threads: of all ranks of this host.
    """
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return 0.0
    return CROWDED_SPIN if threads > usable_cpus() else SPIN


class Links:
    """Messages between ranks, whose lengths both sides know.

    Attributes:
        sent: bytes sent so far.
        calls: exchanges so far.
        crowded: whether ranks of this host have more threads than it has processors: while this
            one waits for a message, its threads then sleep.
        exclusive: whether no other rank of this host works while this one does.
        seconds: spent in them.
        waiting_for: a rank whose message has not come, -1 for any; None while there is no such.
    """

    def __init__(
        self,
        sockets: Mapping[int, socket.socket],
        lost: Callable[[int, str], None],
        spin: float = 0.0,
    ) -> None:
        """
        Args:
            lost: called with a rank and the reason when a connection breaks; does not return.
            spin: `spin_seconds`.
        """
        self.sockets, self.lost, self.spin = sockets, lost, spin
        self.crowded = self.exclusive = False
        self.sent = self.calls = 0
        self.seconds = 0.0
        self.waiting_for: int | None = None

    def exchange(
        self,
        send: Sequence[tuple[int, memoryview]],
        receive: Sequence[tuple[int, memoryview]],
    ) -> None:
        """Send to some ranks and receive from some, all at once.

        The buffers are bytes; those that arrive are written into.
        """
        self.begin(sum(len(data) for _, data in send))
        outgoing, incoming = [], []
        for rank, data in send:
            if rest := self._send(rank, data):
                outgoing.append((rank, rest))
        for rank, buffer in receive:
            if rest := self._receive(rank, buffer):
                incoming.append((rank, rest))
        while outgoing or incoming:
            self._wait(outgoing, incoming)
            outgoing = [(r, rest) for r, data in outgoing if (rest := self._send(r, data))]
            incoming = [(r, rest) for r, data in incoming if (rest := self._receive(r, data))]
        self.waiting_for = None
        self.end()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What waits for other ranks by other ways than these sockets."""
        self.waiting_for = -1
        try:
            yield
        finally:
            self.waiting_for = None

    def begin(self, nbytes: int) -> None:
        """Count an exchange, in which this rank sends so many bytes."""
        self.sent += nbytes
        self._began = time.perf_counter()

    def end(self) -> None:
        """Count the time since `begin`."""
        self.calls += 1
        self.seconds += time.perf_counter() - self._began

    def _wait(self, outgoing: list, incoming: list) -> None:
        self.waiting_for = (incoming or outgoing)[0][0]
        poll = select.poll()
        masks: dict[int, int] = {}
        for pairs, event in ((outgoing, select.POLLOUT), (incoming, select.POLLIN)):
            for rank, _ in pairs:
                number = self.sockets[rank].fileno()
                masks[number] = masks.get(number, 0) | event
        for number, mask in masks.items():
            poll.register(number, mask)
        if self.crowded:
            library.idle(exclusive=self.exclusive)
        until = time.perf_counter() + self.spin
        while time.perf_counter() < until:
            if poll.poll(0):
                return
            os.sched_yield()  # to whoever has work for this processor
        poll.poll()

    def _send(self, rank: int, data: memoryview) -> memoryview | None:
        """What of the data could not be sent yet."""
        try:
            count = self.sockets[rank].send(data)
        except BlockingIOError:
            return data
        except OSError as error:
            self.lost(rank, _reason(error))
        return data[count:] if count < len(data) else None

    def _receive(self, rank: int, buffer: memoryview) -> memoryview | None:
        """What of the buffer has not been received yet."""
        if not buffer:
            return None
        try:
            count = self.sockets[rank].recv_into(buffer)
        except BlockingIOError:
            return buffer
        except OSError as error:
            self.lost(rank, _reason(error))
        if not count:
            self.lost(rank, DIED)
        return buffer[count:] if count < len(buffer) else None
