"""The processes of one run: found through torchrun, compared, watched, and arranged in a mesh."""

from __future__ import annotations

import atexit
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from qllm import launch as launching
from qllm.cgroups import usable_cpus
from qllm.errors import UserError, first_line
from qllm.launch import Launch
from qllm.ops.cpu import library
from qllm.parallel.group import Group
from qllm.parallel.links import POLL, Links, Mesh, RankError, spin_seconds
from qllm.parallel.pipeline import ParallelContext
from qllm.parallel.watch import BUSY, SHARE, STATUS, Watchdog

LONG = timedelta(days=7)  # of torch.distributed's own timeouts: the watch knows better
DIFFERENT = 200  # characters of a value that differs between ranks are shown


@dataclass(frozen=True)
class ParallelConfig:
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
        pp: the ranks that are the stages of this one's pipeline.
    """

    def __init__(self, launch: Launch, config: ParallelConfig, timeout: float, device: str) -> None:
        """
        Raises:
            ConnectionError: a rank did not come in time, or the store is not there.
        """
        self.rank, self.world, self.config = launch.rank, launch.world, config
        self.device = device
        self.progress, self.busy, self.joined = 0, False, False
        deadline = time.monotonic() + timeout * SHARE

        def find() -> tuple[dist.Store, Mesh]:
            store = _store(launch, deadline)
            return store, Mesh(dist.PrefixStore("qllm/watch", store), launch, deadline)

        with ExitStack() as on_error:
            try:
                # No watch bounds these yet, and torch's store waits for one that is stopped.
                patience = timeout * (1 + SHARE) / 2
                store, self._control = _within(patience, find, _address(launch))
                on_error.callback(self._control.close)
                # From here on it is noticed when a rank dies or is stopped, whatever the others do.
                self.watchdog = Watchdog(launch.rank, self._control.sockets, timeout, self._state)
                self.links = Links({}, self.watchdog.fail)
                self.watchdog.start()
                on_error.callback(self.watchdog.stop)
                with self.links.waiting():
                    self._mesh = Mesh(dist.PrefixStore("qllm/data", store), launch, deadline)
                on_error.callback(self._mesh.close)
                self.links.sockets = self._mesh.sockets
                self._name_hosts()
                with self.links.waiting():
                    self._join_group(dist.PrefixStore("qllm/group", store), device)
            except dist.DistError as error:
                raise ConnectionError(f"the store was lost ({first_line(error)})") from None
            on_error.pop_all()

    def _name_hosts(self) -> None:
        """Learn where the others run, and with how many threads.

        Of a run that ends, a line says which of them ended it. Where ranks of a host have more
        threads than it has processors, one that waits spins shortly, and its threads not at all.
        """
        host, own = f"{socket.gethostname()} {self._control.address}", torch.get_num_threads()
        here = 0
        for rank, (name, pid, threads) in enumerate(
            self.all_gather_object([host, os.getpid(), own])
        ):
            here += threads if name == host else 0
            if rank != self.rank:
                self.watchdog.peers[rank].host, self.watchdog.peers[rank].pid = name, pid
        self.links.spin = spin_seconds(here)
        self.links.crowded = here > usable_cpus()

    def _join_group(self, store: dist.Store, device: str) -> None:
        """torch.distributed's own process groups: the engine of large messages."""
        kind = torch.device(device).type
        if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface(self._mesh.address)):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        backend = "nccl" if kind == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.world, timeout=LONG
            )
        except dist.DistError:
            raise
        except RuntimeError as error:  # such as of an interface that this host does not have
            reason = first_line(error)
            raise ConnectionError(f"{backend} did not start ({reason})") from None
        config = self.config
        mesh = init_device_mesh(kind, (config.pp, config.tp), mesh_dim_names=("pp", "tp"))
        stage, tp_rank = divmod(self.rank, config.tp)
        ranks = range(stage * config.tp, (stage + 1) * config.tp)
        self.tp = Group(tuple(ranks), tp_rank, self.links, mesh.get_group("tp"))
        ranks = range(tp_rank, self.world, config.tp)
        self.pp = Group(tuple(ranks), stage, self.links, mesh.get_group("pp"))

    def _state(self) -> tuple[int, int | None]:
        # What ranks do before they were compared has no steps to count: its tenths of a second do.
        steps = self.progress if self.joined else int(10 * time.process_time())
        waiting = BUSY if self.busy else self.links.waiting_for
        return steps + self.links.calls, waiting

    def compare(self, facts: Mapping[str, Any]) -> None:
        """End the run where ranks were not started alike.

        Kernels are among what is compared in exact mode: their sums have orders of their own.

        Args:
            facts: what has to be the same for all, in JSON's types.
        """
        if self.config.mode == "exact":
            with self.unbounded():  # they may have to be compiled first
                kernels = library.unavailable() or library.library().path
            facts = {**facts, "kernel path": kernels}
        everyone = self.all_gather_object(facts)
        for rank, theirs in enumerate(everyone):
            for key, value in theirs.items():
                if value != everyone[0].get(key):
                    mine, other = str(everyone[0].get(key))[:DIFFERENT], str(value)[:DIFFERENT]
                    self.watchdog.fail(rank, f"its {key} is {other}, that of rank 0 is {mine}")
        self.joined = True

    def broadcast(self, value: object) -> object:
        """Rank 0's value, of JSON's types, on all ranks."""
        return self.all_gather_object(value if self.rank == 0 else None)[0]

    def all_gather_object(self, value: object) -> list:
        """Each rank's value, of JSON's types, in the order of the ranks."""
        data = json.dumps(value).encode()
        lengths = self._exchange_all(struct.pack("<q", len(data)), [8] * self.world)
        sizes = [struct.unpack("<q", part)[0] for part in lengths]
        return [json.loads(part) for part in self._exchange_all(data, sizes)]

    def _exchange_all(self, data: bytes, sizes: list[int]) -> list[bytes]:
        """The bytes of every rank, whose sizes are known."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        buffers = {rank: bytearray(sizes[rank]) for rank in others}
        receive = [(rank, memoryview(buffers[rank])) for rank in others]
        self.links.exchange([(rank, memoryview(data)) for rank in others], receive)
        return [data if rank == self.rank else bytes(buffers[rank]) for rank in range(self.world)]

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

    def context(self, cuts: tuple[int, ...] | None = None) -> ParallelContext:
        """What a model is loaded with, so that these ranks share it.

        Args:
            cuts: where stages begin, in halves of layers; None: balanced by bytes.
        """
        return ParallelContext(self.tp, self.config.mode, self.pp, cuts)

    def close(self) -> None:
        """Leave the others: this rank is done."""
        self.watchdog.leave()
        dist.destroy_process_group()
        self._mesh.close()
        self._control.close()


def _within(seconds: float, find: Callable[[], tuple[dist.Store, Mesh]], address: str) -> Any:
    """What a function returns, called in a thread that is left behind where it does not return.

    Raises:
        ConnectionError: it did not return in time.
    """
    found: Future = Future()

    def run() -> None:
        try:
            found.set_result(find())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        raise ConnectionError(f"what listens at {address} does not answer as a store") from None


def _address(launch: Launch) -> str:
    return f"{launch.master}:{launch.port}"


def _store(launch: Launch, deadline: float) -> dist.Store:
    """The store of the launcher, or one that rank 0 keeps, by which ranks find each other.

    Raises:
        ConnectionError: it cannot be reached.
    """
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and launch.rank == 0
    try:
        if own:
            socket.getaddrinfo(launch.master, launch.port)  # as the other ranks will
        else:
            _wait_for_store(launch, deadline)
        patience = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        # What cannot be reached, torch reports in forty lines; its own store, rank 0 always can.
        host = "127.0.0.1" if own else launch.master
        return dist.TCPStore(host, launch.port, launch.world, own, patience, wait_for_workers=False)
    except OSError as error:
        reason = error.strerror or str(error)
    except dist.DistError as error:
        reason = first_line(error)
    raise ConnectionError(f"the store at {_address(launch)} was not found ({reason})")


def _wait_for_store(launch: Launch, deadline: float) -> None:
    """Return when something listens where the store is to be.

    torch's own client prints forty lines for each connection that is refused.

    Raises:
        OSError: nothing does in time.
    """
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            socket.create_connection((launch.master, launch.port), left).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)
        else:
            return


def interface(address: str) -> str | None:
    """The network interface that has an address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None


def explain(error: BaseException) -> str | None:
    """What ended this rank, in a line for the others; None for a normal end."""
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and not error.code):
        return None
    if isinstance(error, BrokenPipeError):  # links between ranks have an error of their own
        return "standard output was closed"
    return " ".join(str(error).split())[:500] or type(error).__name__


@contextmanager
def session(
    config: ParallelConfig,
    *,
    timeout: float = 60.0,
    device: str = "cpu",
    failed: Callable[[BaseException], str | None] = explain,
) -> Iterator[Session]:
    """This process among those that torchrun started.

    Args:
        timeout: seconds within which a run that cannot go on has ended.
        device: of this process's part of a model.
        failed: the line for an error that ends this rank, and so all; None where it is none.

    Raises:
        ParallelError: the others did not come in time.
    """
    launch = Launch.of_environment()
    try:
        joined = Session(launch, config, timeout, device)
    except RankError as error:
        trouble = launching.trouble(error.rank)
        atexit.register(launching.end_stopped, error.rank)  # after it was said why
        line = f"{error} within {timeout * SHARE:.0f} s{f'; {trouble}' if trouble else ''}"
        raise ParallelError(f"{line}; the run ends") from None
    except ConnectionError as error:
        raise ParallelError(f"{error}; the run ends") from None
    try:
        yield joined
    except BaseException as error:
        if reason := failed(error):
            status = 2 if isinstance(error, UserError) else STATUS
            joined.watchdog.end(f"rank {joined.rank}: {reason}", status=status)
        raise
    joined.close()


class ParallelError(OSError):
    """The processes of a run did not find each other."""

    status = STATUS
