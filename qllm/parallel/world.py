"""A program of one's own among those that torchrun started, for as long as it runs."""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING

from qllm.errors import UserError
from qllm.launch import Launch

if TYPE_CHECKING:
    from qllm.parallel.pipeline import ParallelContext


def check_world(tp: int) -> None:
    """Refuse a number of processes that is not the one that torchrun started.

    Raises:
        UserError: says what would work.
    """
    world = Launch.of_environment().world
    if tp < 1 or world != tp:
        found = "this is one" if world == 1 else f"there are {world}"
        start = f"it with torchrun --nproc-per-node {tp}" if tp > 1 else "it without torchrun"
        raise UserError(
            f"tp={tp} takes {max(tp, 1)} process{'es' if tp > 1 else ''}, and {found}: put the "
            f"program in a file and start {start}"
        )


def join(tp: int, device: str, facts: Mapping[str, object]) -> ParallelContext:
    """This process's part of what `tp` ranks share; it leaves the others when the program ends.

    Args:
        facts: what has to be the same for all, in JSON's types.
    """
    from qllm.parallel.session import ParallelConfig, session

    stack = ExitStack()
    joined = stack.enter_context(session(ParallelConfig(tp), device=device))
    atexit.register(stack.close)
    joined.compare(facts)
    # Between two calls a program may take any time.
    stack.enter_context(joined.unbounded())
    return joined.context()
