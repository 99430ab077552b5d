"""How a rank waits for a message."""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from ranks import lost

from qllm.launch import Launch
from qllm.parallel import links
from qllm.parallel.links import CROWDED_SPIN, SPIN, Links, Mesh, RankError, spin_seconds
from qllm.parallel.watch import Watchdog


@pytest.mark.parametrize(("spin", "delay"), [(10.0, 0.02), (0.01, 0.2), (0.0, 0.02)])
def test_a_rank_looks_for_a_message_for_a_while_then_sleeps(spin, delay, monkeypatch):
    waits, yields = [], []

    class Poll:
        def __init__(self):
            self.poll_ = poll()
            self.register = self.poll_.register

        def poll(self, *timeout):
            waits.append(timeout)
            return self.poll_.poll(*timeout)

    poll = select.poll
    monkeypatch.setattr(links.select, "poll", Poll)
    monkeypatch.setattr(links.os, "sched_yield", lambda: yields.append(1))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        found = bytearray(5)
        timer = threading.Timer(delay, theirs.sendall, [b"hello"])
        timer.start()
        Links({1: ours}, lost, spin).exchange([], [(1, memoryview(found))])
        timer.join()
    assert found == b"hello"
    assert bool(yields) == (spin > 0)
    slept = waits.count(())
    assert slept == (spin < delay) and waits[len(waits) - slept :] == [()] * slept


@pytest.mark.parametrize(
    ("threads", "policy", "seconds"),
    [(2, "", SPIN), (3, "", CROWDED_SPIN), (3, "active", CROWDED_SPIN), (2, "PASSIVE", 0.0)],
)
def test_ranks_spin_shortly_where_others_need_their_processors(
    threads, policy, seconds, monkeypatch
):
    monkeypatch.setattr(links, "usable_cpus", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert spin_seconds(threads) == seconds


def test_strangers_do_not_keep_ranks_from_each_other(monkeypatch):
    """One that resets its connection, one that says nothing, and one that says half a header."""
    monkeypatch.setattr(links, "HEADER_SECONDS", 0.1)
    store = dist.HashStore()
    launches = [Launch(rank, 2, rank, range(2), "127.0.0.1", 1) for rank in range(2)]
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Mesh, store, launches[0], deadline)
        address, port, _ = store.get("rank0").decode().split()
        strangers = [socket.create_connection((address, int(port))) for _ in range(3)]
        reset = struct.pack("ii", 1, 0)  # no more waiting, and no proper end
        strangers[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        strangers[0].close()
        strangers[1].sendall(b"GET / HTTP/1.1")
        second = Mesh(store, launches[1], deadline)
        meshes = [first.result(), second]
    for ours, theirs in ((0, 1), (1, 0)):
        meshes[ours].sockets[theirs].sendall(b"hello")
        ready, _, _ = select.select([meshes[theirs].sockets[ours]], [], [], 10)
        assert ready[0].recv(5) == b"hello"
    for opened in (*meshes, *strangers):
        opened.close()


def test_a_mesh_that_fails_leaves_no_connection():
    store = dist.HashStore()
    with socket.create_server(("127.0.0.1", 0)) as server:
        store.set("rank0", f"127.0.0.1 {server.getsockname()[1]} key")
        with pytest.raises(RankError, match="rank 2: it did not start") as caught:
            Mesh(store, Launch(1, 3, 1, range(3), "127.0.0.1", 1), time.monotonic() + 0.1)
        opened, _ = server.accept()
        with opened:
            opened.settimeout(10)
            while opened.recv(64):  # until the other side has closed it
                pass
        assert caught.value.rank == 2  # and what is known of the error holds all that it saw


class Slow:
    """A socket that takes a few bytes at a time, and sometimes none."""

    def __init__(self):
        self.sent, self.calls = b"", 0

    def send(self, data):
        self.calls += 1
        if self.calls % 3 == 0:
            raise BlockingIOError
        self.sent += data[:7]
        return len(data[:7])


def test_a_watchdog_s_lines_come_whole_however_little_is_taken_at_a_time():
    slow = Slow()
    watchdog = Watchdog(0, {1: slow}, 1.0, lambda: (0, None))
    for number in range(40):
        watchdog._send({"heartbeat": [number, None]})
    *lines, _ = slow.sent.split(b"\n")
    assert lines and all(json.loads(line)["heartbeat"][1] is None for line in lines)
