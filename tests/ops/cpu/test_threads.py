"""How threads share a call's work, whoever calls, and from where."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from cpu_paths import DTYPES, normal, on, paths, random_weight, same
from fences import run_in

from qllm.ops import phase
from qllm.ops.cpu import build, library, linear, steps
from qllm.ops.cpu.capture import capture_calls
from qllm.ops.kv import KV, Batch

# What share_work does, seen from inside: how often each number was taken, and which threads came.
# A thread that has taken its first part waits until `wanted` threads have one.
SOURCE = """
#include <time.h>
#include "threads.h"
using namespace qllm;
extern "C" __attribute__((visibility("default")))
int64_t shared(int64_t count, int64_t part, int64_t wanted, int64_t *taken, int64_t *came) {
    int64_t there = 0, most = max_threads();
    in_threads(count, part, [&](const Share &share) {
        bool first = true;
        __atomic_add_fetch(came + share.thread, 1, __ATOMIC_RELAXED);
        take_parts(share, [&](int64_t from, int64_t end) {
            for (int64_t i = from; i < end; i++) __atomic_add_fetch(taken + i, 1, __ATOMIC_RELAXED);
            if (first) __atomic_add_fetch(&there, 1, __ATOMIC_RELAXED);
            first = false;
            const timespec soon = {0, 100000};
            for (int i = 0; i < 100000 && __atomic_load_n(&there, __ATOMIC_RELAXED) < wanted; i++)
                nanosleep(&soon, nullptr);
        });
    });
    return there * 1000 + most;
}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """share_work of `count` in parts: which numbers were taken, and by which threads."""
    if sys.platform != "linux" or not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("compiles C++ on Linux")
    folder = tmp_path_factory.mktemp("src")
    for name in ("threads.cpp", "threads.h", "kernels.h"):
        shutil.copy(build.SOURCE / name, folder)
    (folder / "shared.cpp").write_text(SOURCE)
    library = build.load(folder)
    library.shared.restype = ctypes.c_int64

    def run(count: int, part: int, wanted: int) -> tuple[list[int], list[int], int]:
        taken, came = (ctypes.c_int64 * count)(), (ctypes.c_int64 * 64)()
        sizes = map(ctypes.c_int64, (count, part, wanted))
        there, max_threads = divmod(library.shared(*sizes, taken, came), 1000)
        assert max_threads == torch.get_num_threads()
        return list(taken), list(came), there

    return run


@pytest.fixture
def threads():
    """torch.set_num_threads, for a while."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 2])
def test_threads_come_and_share_what_there_is(shared, threads, number):
    threads(number)
    for count, part in ((0, 1), (1, 1), (number, 1), (97, 3), (1000, 7)):
        max_threads = max(1, min(number, -(-count // part)))
        taken, came, there = shared(count, part, max_threads)
        assert taken == [1] * count
        assert there == (max_threads if count else 0) and came == [1] * max_threads + [0] * (
            64 - max_threads
        )


def test_a_call_does_not_wait_for_threads_that_do_not_come(shared, threads):
    # Its work is done by the one that is there; and others that come late do none of it twice.
    threads(3)
    for count in (2, 3, 50):
        for _ in range(200):
            assert shared(count, 1, 1)[0] == [1] * count


def test_threads_leave_signals_to_others_and_have_their_own_faults(shared, threads):
    """A fault whose signal is blocked ends the process without a word of faulthandler's."""
    threads(3)
    shared(1000, 1, 3)
    tasks = Path("/proc/self/task").glob("*/status")
    found = [re.search(r"SigBlk:\s*(\w+)", task.read_text(encoding="ascii")) for task in tasks]
    blocked = [
        {number for number in signal.Signals if int(mask[1], 16) >> (number - 1) & 1}
        for mask in found
        if mask
    ]
    ours = [mask for mask in blocked if {signal.SIGINT, signal.SIGTERM, signal.SIGCHLD} <= mask]
    assert len(ours) >= 2
    assert all(mask.isdisjoint({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL}) for mask in ours)


def test_calls_at_once_do_without_each_other(shared, threads):
    threads(3)
    found = []

    def run() -> None:
        torch.set_num_threads(3)
        found.extend(shared(100, 3, 1)[0] == [1] * 100 for _ in range(100))

    callers = [threading.Thread(target=run) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 400


def test_a_new_thread_takes_the_number_that_torch_is_set_to_have(threads):
    paths()
    openmp = ctypes.CDLL(build._openmp_of_torch() or build.SYSTEM_OPENMP)
    x, found = torch.zeros(1, 2), []
    with capture_calls() as captured:
        steps.add(x, x)

    def run(call: Callable[[], object]) -> None:
        call()
        found.append(openmp.omp_get_max_threads())

    number = openmp.omp_get_max_threads() + 3  # nobody's
    threads(number)
    for call in (partial(steps.add, x, x), captured.replay):
        caller = threading.Thread(target=run, args=(call,))
        caller.start()
        caller.join()
    assert found == [number] * 2


# What follows runs in processes of its own.


def every_kernel(dtypes: Iterable[torch.dtype] = DTYPES) -> list[torch.Tensor]:
    """Results of all that threads share."""
    found = []
    for dtype in dtypes:
        weight, dense = random_weight((300, 256)), normal(800, 256, dtype=dtype)
        for rows in (1, 3, 40):
            x = normal(rows, 256, dtype=dtype)
            found += [weight.kernel(x), linear.dense_linear(x, dense, None)]
            with phase.decode():
                found.append(linear.dense_linear(x, dense, None))
        found.append(steps.gated_activation(normal(200, 512, dtype=dtype), "gelu"))
        x, kv = normal(200, 192, dtype=dtype), KV(*torch.zeros(2, 1, 2, 200, 32, dtype=dtype))
        found.append(steps.prefill_attention(x, kv, Batch.of([200], "cpu"), None, None))
        x, kv = normal(16, 192, dtype=dtype), KV(*torch.zeros(2, 16, 2, 90, 32, dtype=dtype))
        batch = Batch.of([1] * 16, "cpu", pasts=[80] * 16)
        found.append(steps.decode_attention(x, kv, batch, None, None))
    return found


def with_little_stack() -> None:
    for name, dtype in zip(paths(), itertools.cycle(DTYPES)):
        with on(name):
            torch.set_num_threads(1)
            alone = every_kernel([dtype])
            torch.set_num_threads(3)
            assert all(map(same, every_kernel([dtype]), alone))


def in_a_fork() -> None:
    torch.set_num_threads(2)
    weight, x = random_weight((300, 256)), normal(40, 256)
    before = weight.kernel(x)
    child = os.fork()
    assert same(weight.kernel(x), before)
    if not child:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def beside_torch() -> None:
    def cpu_seconds() -> float:
        begin = time.process_time()
        for _ in range(5):
            x.add(1)  # on torch's threads, which then wait for more to do
            time.sleep(0.02)
        return time.process_time() - begin

    x = normal(1 << 18)
    before = cpu_seconds()
    every_kernel()
    time.sleep(0.02)  # in which the kernels' threads, too, go to sleep
    assert cpu_seconds() < before / 4


def at_rest() -> None:
    def cpu_seconds(rest: bool) -> float:
        begin = time.process_time()
        for _ in range(5):
            weight.kernel(x)
            if rest:
                library.idle()
            time.sleep(0.008)  # less than they spin
        return time.process_time() - begin

    torch.set_num_threads(1)  # torch's own threads, which would spin as well, do not start
    weight, x = random_weight((300, 256)), normal(40, 256)
    torch.set_num_threads(2)
    cpu_seconds(False)
    assert cpu_seconds(True) < cpu_seconds(False) / 2


def in_turns() -> None:
    def lacking() -> list[set[int]]:
        """Of each thread that may not use all processors of this one, those that it may not."""
        found = []
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it has just ended
                found.append(os.sched_getaffinity(0) - os.sched_getaffinity(int(task.name)))
        return [processors for processors in found if processors]

    torch.set_num_threads(2)
    weight, x = random_weight((300, 256)), normal(40, 256)
    before = weight.kernel(x)
    for exclusive in (False, True, True, False):
        deadline = time.monotonic() + 30  # until when the thread has come
        while True:
            library.idle(exclusive=exclusive)
            assert same(weight.kernel(x), before)
            found = lacking()
            if len(found) == exclusive or time.monotonic() > deadline:
                break
        assert list(map(len, found)) == [1] * exclusive


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        # The least that the system takes; the first thread has the process's.
        pytest.param("with_little_stack", {"OMP_STACKSIZE": "16k"}, marks=pytest.mark.slow),
        ("in_a_fork", {}),
        ("in_turns", {"OMP_NUM_THREADS": "CPUS"}),
        # Threads of OpenMP spin for ever, but where there are more of them than processors.
        ("at_rest", {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "CPUS"}),
        ("beside_torch", {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "CPUS"}),
    ],
)
def test_in_a_process(command, environment):
    paths()
    cpus = len(os.sched_getaffinity(0))
    if "CPUS" in environment.values() and cpus == 1:
        pytest.skip("needs two processors")
    environment = {name: value.replace("CPUS", str(cpus)) for name, value in environment.items()}
    done = run_in(Path(__file__), f"{command}()", **environment)
    assert done.returncode == 0, done.stderr
