"""What a script does before it imports anything: in words that older Pythons read, too."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

OLDEST = (3, 11)
# Objects made, less those that are gone, until Python looks for those that hold each other alone:
# more than a start makes, which stay.
COLLECTED_AFTER = 400_000


class _Ending:
    """How the process ends.

    Attributes:
        status: what `cli.run` ends with; None where it did not come to its end.
    """

    status: int | None = None


ending = _Ending()


def begin() -> None:
    """Refuse a Python that is too old, hold signals back for `cli.run`, start and end faster."""
    if sys.version_info < OLDEST:
        found, needed = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST))
        line = f"{Path(sys.argv[0]).name}: error: QLLM takes Python {needed} or later, not {found}"
        print(line, file=sys.stderr)
        sys.exit(2)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    gc.set_threshold(COLLECTED_AFTER)
    atexit.register(_leave)  # the first to be registered is the last to be called
    from qllm.deferred import defer

    defer()


def _leave() -> None:
    """End the process where all that has to be done is: taking torch apart would be 0.2 s more."""
    if ending.status is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # as Python, which says no more
                stream.flush()
        os._exit(ending.status)
