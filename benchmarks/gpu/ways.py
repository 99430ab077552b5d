"""How a layer multiplies where this package has several ways: a benchmark names the one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from qllm.ops.gpu import cuda, decode, decode_int8, hopper, hopper_int8, prefill

SYSTEM = "as --explain says"


def _says(answer: object) -> Callable[..., Any]:
    return lambda *given, **named: answer


def _prefetching(*given: Any, cut: Callable[..., cuda.Cut] = cuda.cut) -> cuda.Cut:
    return cut(*given)._replace(prefetched=PREFETCHED)


PREFETCHED = 64  # KB of a panel, which is all of most
NOT_ASKED = _says("it is measured without")
IN_CUDA = (decode, decode_int8, hopper, hopper_int8)
NOT_IN_CUDA = (hopper, "unsupported_reason", NOT_ASKED)
# By a way's name, what of the package answers otherwise; the first one leaves it as it is.
ANSWERS: dict[str, tuple[tuple[object, str, Callable[..., Any]], ...]] = {
    SYSTEM: (),
    # Triton's products; and those of steps that begin when the one in front has ended, or that ask
    # for weights into the L2 before.
    "Triton": tuple((module, "unsupported_reason", NOT_ASKED) for module in IN_CUDA),
    "no PDL": ((decode, "late_reason", NOT_ASKED),),
    "into L2": ((cuda, "cut", _prefetching),),
    # Prompts in Triton: weights become numbers in registers; once, in memory; or sums are scaled.
    "registers": (NOT_IN_CUDA, (prefill, "many_rows", _says(1 << 30))),
    "memory": (NOT_IN_CUDA, (prefill, "many_rows", _says(0))),
    "scaled sums": ((prefill, "unsupported_reason", NOT_ASKED),),
}
OF_STEPS, OF_PROMPTS = ("Triton", "no PDL", "into L2"), ("registers", "memory", "scaled sums")


@contextmanager
def taking(way: str) -> Iterator[None]:
    """What a layer multiplies inside goes one of the ways."""
    with ExitStack() as stack:
        for module, name, answer in ANSWERS[way]:
            stack.enter_context(mock.patch.object(module, name, answer))
        yield


def through(way: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A product that goes one of the ways."""

    def call(*given: object) -> object:
        with taking(way):
            return run(*given)

    return run if way == SYSTEM else call
