"""Ranks as threads of this process, joined by sockets: many more than processes could be."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from itertools import combinations

import pytest

from qllm.ops.cpu import linear
from qllm.parallel import group
from qllm.parallel.group import Group
from qllm.parallel.links import Links


def lost(rank: int, reason: str) -> None:
    raise ConnectionError(f"rank {rank}: {reason}")


def share_a_processor() -> None:
    """Keep this thread to one processor, which is another for each worker that runs tests.

    Python runs one thread at a time; on several processors they take it from each other.
    """
    if sys.platform == "linux":
        usable = sorted(os.sched_getaffinity(0))
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        os.sched_setaffinity(0, {usable[worker % len(usable)]})


def on_ranks(world: int, run: Callable[[int, Links], object], timeout: float = 120) -> list:
    """What a function of the rank and its links returns on each rank."""
    sockets: list[dict[int, socket.socket]] = [{} for _ in range(world)]
    for a, b in combinations(range(world), 2):
        sockets[a][b], sockets[b][a] = socket.socketpair()
    for mine in sockets:
        for link in mine.values():
            link.setblocking(False)
    results: list = [None] * world
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        share_a_processor()
        try:
            results[rank] = run(rank, Links(sockets[rank], lost))
        except BaseException as error:
            errors.append(error)
            for link in sockets[rank].values():
                link.shutdown(socket.SHUT_RDWR)

    lock, pack = threading.Lock(), linear.pack

    def packed(*args):  # memory for packed weights is handed out to one thread at a time
        with lock:
            return pack(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "pack", packed)
        patch.setattr(group, "SMALL", 1 << 40)  # torch.distributed has no part in this
        threads = [
            threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
    for mine in sockets:
        for link in mine.values():
            link.close()
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
    return results


def in_group(world: int, run: Callable[[Group], object]) -> list:
    """What a function of a group of all ranks returns on each rank."""
    return on_ranks(world, lambda rank, links: run(Group(range(world), rank, links)))
