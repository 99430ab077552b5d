"""Which processes a run may end: those that its own torchrun started, and that are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from qllm import launch

OURS = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


@pytest.fixture
def stopped_rank(monkeypatch):
    """Starts a stopped process that says it is rank 1, below the one that started this rank 0."""
    started = []

    def start(**changes: str) -> subprocess.Popen:
        here = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", **OURS}
        for key, value in here.items():
            monkeypatch.setenv(key, value)
        command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
        started.append(
            subprocess.Popen(command, env={**os.environ, **here, "RANK": "1", **changes})
        )
        started[-1].send_signal(signal.SIGSTOP)
        process, end = psutil.Process(started[-1].pid), time.monotonic() + 10
        while process.status() != psutil.STATUS_STOPPED and time.monotonic() < end:
            time.sleep(0.01)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_stopped_rank_of_this_run_is_ended(stopped_rank):
    process = stopped_rank()
    assert launch.trouble(1) == f"its process {process.pid} is stopped"
    launch.end_stopped(1)
    assert process.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("key", ["MASTER_PORT", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"])
def test_a_rank_of_another_run_is_left_alone(key, stopped_rank):
    process = stopped_rank(**{key: "29502"})
    launch.end_stopped(1)
    time.sleep(0.05)
    assert process.poll() is None
