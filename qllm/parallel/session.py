"""The processes of one run: found through torchrun, compared, watched, and arranged in a mesh."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qllm.errors import UserError, first_line
from qllm.parallel.group import Group
from qllm.parallel.links import Links, Mesh
from qllm.parallel.watch import BUSY, SHARE, STATUS, Watch

LONG = timedelta(days=7)  # of torch.distributed's own timeouts: the watch knows better
DIFFERENT = 200  # characters of a value that differs between ranks are shown


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process.

    Attributes:
        rank, world: of all processes.
        local: the rank on its own host.
    """

    rank: int
    world: int
    local: int
    master: str

    @classmethod
    def of_environment(cls) -> Launch:
        """As torchrun sets it in RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR."""
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        return cls(rank, world, local, os.environ.get("MASTER_ADDR", "127.0.0.1"))


@dataclass(frozen=True)
class Layout:
    """How the ranks share a model.

    Attributes:
        tp: ranks that share each layer.
        pp: stages that share the layers.
        mode: of tensor parallelism: "exact" or "fast".
    """

    tp: int = 1
    pp: int = 1
    mode: str = "exact"


class Session:
    """This process among the others.

    Attributes:
        rank, world: of all processes.
        tp: the ranks that share this one's layers.
        stage: which stage of the pipeline this rank is in.
    """

    def __init__(self, launch: Launch, layout: Layout, timeout: float, device: str) -> None:
        """
        Raises:
            ConnectionError: a rank did not come in time.
        """
        self.rank, self.world, self.layout = launch.rank, launch.world, layout
        self.device = device
        self.progress, self.busy = 0, False
        patience = timeout * SHARE
        store = _store(launch, patience)

        def prefixed(name: str) -> dist.Store:
            return dist.PrefixStore(f"qllm/{name}", store)

        arguments = (launch.rank, launch.world, launch.master, patience)
        self._control = Mesh(prefixed("watch"), *arguments)
        self.watch = Watch(launch.rank, self._control.sockets, timeout, self._state)
        self.watch.host = f"{socket.gethostname()} {self._control.address}"
        self.watch.tell({"host": self.watch.host, "pid": os.getpid()})
        for rank, peer in self.watch.peers.items():
            found = self.watch.hear(rank)
            peer.host, peer.pid = found["host"], found["pid"]
        self._mesh = Mesh(prefixed("data"), *arguments)
        self.links = Links(self._mesh.sockets, self.watch.fail)
        self._join_group(prefixed("group"), device)

    def _join_group(self, store: dist.Store, device: str) -> None:
        """torch.distributed's own process groups: the engine of large messages."""
        kind = torch.device(device).type
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface(self._mesh.address)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world, timeout=LONG
        )
        layout = self.layout
        mesh = init_device_mesh(kind, (layout.pp, layout.tp), mesh_dim_names=("pp", "tp"))
        self.stage, self.tp_rank = divmod(self.rank, layout.tp)
        ranks = range(self.stage * layout.tp, (self.stage + 1) * layout.tp)
        self.tp = Group(tuple(ranks), self.tp_rank, self.links, mesh.get_group("tp"))
        line = range(self.tp_rank, self.world, layout.tp)
        self.pp = Group(tuple(line), self.stage, self.links, mesh.get_group("pp"))

    def _state(self) -> tuple[int, int | None]:
        waiting = BUSY if self.busy else self.links.waiting_for
        return self.progress + self.links.calls, waiting

    def compare(self, facts: Mapping[str, object]) -> None:
        """End the run where ranks were not started alike.

        Args:
            facts: what has to be the same for all, in JSON's types.
        """
        self.watch.tell(facts)
        others = {rank: self.watch.hear(rank) for rank in self.watch.peers}
        first = facts if self.rank == 0 else others[0]
        for rank, theirs in sorted({**others, self.rank: facts}.items()):
            for key, value in theirs.items():
                if value != first.get(key):
                    mine, other = str(first.get(key))[:DIFFERENT], str(value)[:DIFFERENT]
                    self.watch.fail(rank, f"its {key} is {other}, that of rank 0 is {mine}")

    def share(self, value: object) -> object:
        """Rank 0's value, given to all; JSON's types."""
        if self.rank == 0:
            self.watch.tell({"value": value})
            return value
        return self.watch.hear(0)["value"]

    def collect(self, value: object) -> list:
        """Each rank's value, in JSON's types, in their order."""
        data = json.dumps(value).encode()
        room = self._exchange_all(struct.pack("<q", len(data)), [8] * self.world)
        sizes = [struct.unpack("<q", part)[0] for part in room]
        return [json.loads(part) for part in self._exchange_all(data, sizes)]

    def _exchange_all(self, data: bytes, sizes: list[int]) -> list[bytes]:
        """The bytes of every rank, whose sizes are known."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        room = {rank: bytearray(sizes[rank]) for rank in others}
        receive = [(rank, memoryview(room[rank])) for rank in others]
        self.links.exchange([(rank, memoryview(data)) for rank in others], receive)
        return [data if rank == self.rank else bytes(room[rank]) for rank in range(self.world)]

    @contextmanager
    def unbounded(self) -> Iterator[None]:
        """Work that may take any time: only death and silence end the run meanwhile."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    @contextmanager
    def meter(self, total: int, done: int) -> Iterator[Callable[[float], None]]:
        """A `Meter` that shows nothing: all that is counted is progress of this rank."""

        def add(count: float) -> None:
            self.progress += 1

        yield add

    def close(self) -> None:
        """This rank is done."""
        self.watch.stop()
        dist.destroy_process_group()
        self._mesh.close()
        self._control.close()


def _store(launch: Launch, timeout: float) -> dist.Store:
    """The store of the launcher, or one that rank 0 keeps, by which ranks find each other.

    Raises:
        ConnectionError: it cannot be reached.
    """
    port = int(os.environ["MASTER_PORT"])
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and launch.rank == 0
    patience = timedelta(seconds=timeout)
    try:
        return dist.TCPStore(
            launch.master, port, launch.world, own, patience, wait_for_workers=False
        )
    except dist.DistError as error:
        raise ConnectionError(
            f"the store at {launch.master}:{port} was not found ({first_line(error)})"
        ) from None


def interface(address: str) -> str | None:
    """The network interface that has an address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


@contextmanager
def session(
    layout: Layout, *, timeout: float, device: str, failed: Callable[[BaseException], str | None]
) -> Iterator[Session]:
    """This process's place among those that torchrun started.

    Args:
        timeout: seconds within which a run that cannot go on has ended.
        failed: the line for an error that ends this rank, and so all; None where it is none.

    Raises:
        ParallelError: the others did not come in time.
    """
    launch = Launch.of_environment()
    try:
        joined = Session(launch, layout, timeout, device)
    except (ConnectionError, TimeoutError) as error:
        raise ParallelError(f"rank {launch.rank}: {error} within {timeout * SHARE:.0f} s") from None
    try:
        yield joined
    except BaseException as error:
        if line := failed(error):
            status = 2 if isinstance(error, UserError) else STATUS
            joined.watch.end(f"rank {joined.rank}: {line}", status=status)
        raise
    joined.close()


class ParallelError(OSError):
    """The processes of a run did not find each other."""
