"""How a rank waits for a message."""

from __future__ import annotations

import select
import socket
import threading

import pytest
from ranks import lost

from qllm.parallel import links
from qllm.parallel.links import CROWDED_SPIN, SPIN, Links, spin_seconds


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
