"""Bad input for the scripts: each case is given to two of those that take it, and when slow to all.

qllm_gen.py runs as a process for the cases that users were promised an answer to, and whatever ends
before torch is imported does; the rest is called in this process, where a second less goes by.
"""

from __future__ import annotations

import pytest
from conftest import run
from inside import call

GEN, REF, CHAT = "qllm_gen.py", "ref_gen.py", "qllm_chat.py"
CONVERT, CALIB, BENCH = "weight_convert.py", "fake_calib_gen.py", "qllm_bench.py"
ALL = (GEN, REF, CONVERT, CALIB, BENCH)
TINY = ("--model-size", "tiny")


def cases(table: dict, processes: set[str]) -> list:
    """A parameter set for each case and each script that takes it: how to start it, which, what.

    Args:
        processes: names of cases for which qllm_gen.py is run as a process.
    """
    assert table.keys() >= processes
    slow = [pytest.mark.slow]
    return [
        pytest.param(
            run if name in processes and script == GEN else call,
            script,
            case,
            id=f"{name}-{script.removesuffix('.py')}",
            # Of a case's other scripts one takes it, which changes from case to case.
            marks=[] if number in (0, 1 + which % max(1, len(case.scripts) - 1)) else slow,
        )
        for which, (name, case) in enumerate(table.items())
        for number, script in enumerate(case.scripts)
    ]
