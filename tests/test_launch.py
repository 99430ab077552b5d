"""Which processes a run may end: those that its own torchrun started, and that are stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import assert_user_error
from inside import call

from qllm import launch
from qllm.errors import UserError
from qllm.launch import Launch
from qllm.parallel.session import ParallelConfig, ParallelError, session

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "RANK is 'x' in the environment; start processes by torchrun"),
        ({"RANK": "2"}, "RANK is '2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is 2 and there is no MASTER_PORT; start"),
    ],
    ids=str,
)
def test_an_environment_that_torchrun_does_not_make_is_refused(changes, message, monkeypatch):
    for key, value in {"RANK": "1", "LOCAL_RANK": "1", **OURS, **changes}.items():
        monkeypatch.delenv(key, raising=False)
        if value is not None:
            monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        Launch.of_environment()


@pytest.mark.parametrize(
    ("rank", "host"), [("1", "127.0.0.1"), ("1", "none.invalid"), ("0", "none.invalid")]
)
def test_a_store_that_is_not_there_is_one_line(rank, host, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    message = f"the store at {host}:{port} was not found .*; the run ends"
    with pytest.raises(ParallelError, match=message), session(ParallelConfig(2), timeout=0.2):
        pass
    assert capfd.readouterr() == ("", "")


def test_a_store_that_never_answers_is_given_up(monkeypatch):
    for key, value in {"RANK": "1", **OURS}.items():
        monkeypatch.setenv(key, value)
    ended = threading.Event()
    monkeypatch.setattr("qllm.parallel.session._store", lambda *_: ended.wait(10))
    message = "^what listens at 127.0.0.1:29501 does not answer as a store; the run ends$"
    with pytest.raises(ParallelError, match=message), session(ParallelConfig(2), timeout=0.1):
        pass
    ended.set()


def test_an_interface_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none99")
    message = "^gloo did not start .*none99.*; the run ends$"
    with pytest.raises(ParallelError, match=message), session(ParallelConfig(), timeout=5):
        pass


SCRIPTS = {
    "qllm_bench.py": (),
    "qllm_chat.py": (),
    "qllm_eval.py": ("--agreement",),
    "qllm_export.py": ("--format", "gguf", "--save", "{}/out.gguf"),
    "qllm_plan.py": ("--avg-bits", "4"),
    "qllm_quant.py": ("--save", "{}/out"),
    "ref_gen.py": (),
    "weight_convert.py": ("--save", "{}/out"),
    "fake_calib_gen.py": ("--save", "{}/out"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_shares_no_model_takes_one_process(script, tmp_path, monkeypatch):
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", **OURS}.items():
        monkeypatch.setenv(key, value)
    args = [arg.format(tmp_path) for arg in SCRIPTS[script]]
    done = call(script, "--model-size", "tiny", *args)
    assert_user_error(done, "there are 2 processes, and this script takes one: start it without")
    assert not list(tmp_path.iterdir())
