"""The end of a run whose ranks cannot all go on: noticed, explained and carried out by each rank.

A watchdog thread of every process sends a heartbeat to all others: that it lives, how far its main
thread is, and which rank that waits for. A rank whose heartbeats stop, whose connection breaks, or
which neither makes progress nor waits, ends the run: the process that notices tells the others, and
each exits by itself, with status 1. No signal is sent to a process that this run did not start.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qllm import launch
from qllm.parallel.links import DIED

STATUS = 1
BUSY = -2
HEARTBEATS = 20  # in the time after which a silent rank is given up
SHARE = 0.8  # of the time that a run may take to end: what is left is for ending it


@dataclass
class Peer:
    """What is known of another rank.

    Attributes:
        host, pid: where it runs, as it says; they are shown, and nothing is sent there.
        last_heartbeat: when a message last came.
        last_progress: when its main thread last got further.
        progress: how far it was then.
        waiting: whether it waits for another rank.
        leaving: whether it has said that it is done.
        rest, unsent: the part of a line that has come so far, and the part that has yet to go.
    """

    socket: socket.socket
    host: str = ""
    pid: int = 0
    last_heartbeat: float = field(default_factory=time.monotonic)
    last_progress: float = field(default_factory=time.monotonic)
    progress: int = -1
    waiting: bool = False
    leaving: bool = False
    rest: bytes = b""
    unsent: bytes = b""


class Watchdog:
    """The thread by which this process and its peers end together."""

    def __init__(
        self,
        rank: int,
        sockets: Mapping[int, socket.socket],
        timeout: float,
        state: Callable[[], tuple[int, int | None]],
    ) -> None:
        """
        Args:
            timeout: seconds within which a run that cannot go on has ended.
            state: returns how far this process is, a number that grows, and the rank it waits for;
                BUSY stands for work that may take any time.
        """
        self.rank, self.timeout, self.state = rank, timeout, state
        self.peers = {other: Peer(link) for other, link in sockets.items()}
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._stop = False
        self._progress, self._last_progress = -1, time.monotonic()

    def start(self) -> None:
        """Start the thread."""
        for peer in self.peers.values():
            peer.last_heartbeat = peer.last_progress = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching. Where this process then goes without a `leave`, the others end."""
        self._stop = True
        self._thread.join()

    def leave(self) -> None:
        """Stop watching: this process is done, and needs none of the others."""
        self.stop()
        self._send({"bye": True})

    # --- the thread

    def _run(self) -> None:
        every = min(1.0, self.timeout / HEARTBEATS)
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, rank)
            last = 0.0
            while not self._stop:
                now = time.monotonic()
                if now - last > 5 * every:  # this process itself was stopped for a while
                    for peer in self.peers.values():
                        peer.last_heartbeat, peer.last_progress = (
                            max(peer.last_heartbeat, now - every),
                            now,
                        )
                if now - last >= every:
                    last = now
                    self._send({"heartbeat": self.state()})
                for key, _ in selector.select(every / 4):
                    self._read(key.data, selector)
                self._judge(time.monotonic())

    def _read(self, rank: int, selector: selectors.BaseSelector) -> None:
        peer = self.peers[rank]
        try:
            data = peer.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, peer.rest = (peer.rest + data).split(b"\n")
        for line in lines:
            value = json.loads(line)
            peer.last_heartbeat = time.monotonic()
            if "end" in value:
                self._end(value["end"])
            elif "bye" in value:
                peer.leaving = True
            else:
                progress, waiting = value["heartbeat"]
                if progress != peer.progress or waiting == BUSY:
                    peer.progress, peer.last_progress = progress, peer.last_heartbeat
                peer.waiting = waiting is not None
        if not data:
            selector.unregister(peer.socket)
            if not peer.leaving:
                self.fail(rank, DIED)

    def _judge(self, now: float) -> None:
        patience = self.timeout * SHARE
        for rank, peer in self.peers.items():
            if peer.leaving:
                continue
            if now - peer.last_heartbeat > patience:
                found = launch.trouble(rank)
                silent = f"it has not been heard of for {patience:.0f} s"
                self.fail(rank, f"{silent}; {found}" if found else silent)
            if now - peer.last_progress > patience and not peer.waiting:
                self.fail(rank, f"it has neither worked nor waited for {patience:.0f} s")
        stuck = [now - peer.last_progress > patience for peer in self.peers.values()]
        progress, waiting = self.state()
        if progress != self._progress or waiting is None or waiting == BUSY:
            self._progress, self._last_progress = progress, now
        if all(stuck) and now - self._last_progress > patience:
            self.end(f"all ranks have waited for each other for {patience:.0f} s")

    def _send(self, value: object) -> None:
        line = json.dumps(value).encode() + b"\n"
        for peer in self.peers.values():
            data = peer.unsent + line
            try:
                peer.unsent = data[peer.socket.send(data) :]
            except OSError:
                continue  # a full buffer or a broken connection: reading tells which

    # --- the end

    def fail(self, rank: int, reason: str) -> None:
        """End the run because of a rank: does not return."""
        peer = self.peers.get(rank)
        where = f" (host {peer.host}, process {peer.pid})" if peer and peer.pid else ""
        self.end(f"rank {rank}{where}: {reason}", rank)

    def end(self, line: str, culprit: int | None = None, status: int = STATUS) -> None:
        """End the run: tell the others, say why, exit. Does not return.

        Args:
            culprit: a rank that may be unable to end by itself.
        """
        self._send({"end": [line, culprit, status]})
        self._end([line, culprit, status])

    def _end(self, end: list) -> None:
        if not self._ending.acquire(blocking=False):
            time.sleep(self.timeout)  # another thread is about to exit
        line, culprit, status = end
        if launch.claim():  # one line for each host
            print(f"qllm: error: {line}; the run ends", file=sys.stderr, flush=True)
        if culprit is not None:
            launch.end_stopped(culprit)
        os._exit(status)
