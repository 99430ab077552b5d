"""Which phase a pass is in: prefill, over whole prompts, or decode, over one token per sequence.

The arithmetic of a product may depend on the phase, never on the number of rows. Prefill is the one
that holds where nothing says otherwise: evaluation, calibration and a single layer are prefill.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Phase(threading.local):
    """That of this thread."""

    decoding = False


_phase = _Phase()


def decoding() -> bool:
    """Whether what this thread computes is a decode step."""
    return _phase.decoding


@contextmanager
def decode() -> Iterator[None]:
    """What is computed inside is a decode step."""
    before, _phase.decoding = _phase.decoding, True
    try:
        yield
    finally:
        _phase.decoding = before
