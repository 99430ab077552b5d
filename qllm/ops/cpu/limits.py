"""What the machine allows, measured by the kernels' own instructions."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

from qllm.ops.cpu import library

READ_BYTES = 256 << 20  # far more than any cache of a core holds
ROUNDS = 2_000_000


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes per second at which all threads together read memory: a median."""
    function = library.library().qllm_read_all
    memory = library.huge_pages(READ_BYTES).zero_()
    arguments = (ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(READ_BYTES))
    return READ_BYTES / median_seconds(lambda: function(*arguments), repeats)


def int8_rate(repeats: int = 5) -> float:
    """Operations per second of int8 products out of registers, two for each product: a median."""
    function = library.library().qllm_multiply_all
    done = function(ctypes.c_int64(1))
    rounds = ctypes.c_int64(ROUNDS)
    return done * ROUNDS / median_seconds(lambda: function(rounds), repeats)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
