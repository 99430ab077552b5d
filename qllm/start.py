"""What a script does before it imports anything: in words that older Pythons read, too."""

from __future__ import annotations

import gc
import signal
import sys
from pathlib import Path

OLDEST = (3, 11)


def begin() -> None:
    """Refuse a Python that is too old, hold signals back for `cli.run`, let torch start faster.

    Modules are many objects that stay: looking through them again and again takes 0.1 s.
    """
    if sys.version_info < OLDEST:
        found, needed = (".".join(map(str, version[:2])) for version in (sys.version_info, OLDEST))
        line = f"{Path(sys.argv[0]).name}: error: QLLM takes Python {needed} or later, not {found}"
        print(line, file=sys.stderr)
        sys.exit(2)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    gc.set_threshold(100_000)
    from qllm.deferred import defer

    defer()
