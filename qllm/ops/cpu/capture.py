"""Calls of kernels, kept so that they can be made again without Python in between.

A decode step makes the same calls for every token, on the same memory: a list of them is to the CPU
what a captured graph is to a GPU. Only what changes (tokens, rows, positions, cosines and sines) is
written into the tensors that the calls read. What is no kernel, such as an exchange with other
processes, is a host callback between two runs of them.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from qllm.ops.cpu.interface import BAD_INDEX, OK, Call

# Ops of torch that a replay may leave out: they compute nothing.
NO_WORK = {
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *(
        "view",
        "_unsafe_view",
        "slice",
        "narrow",
        "select",
        "unbind",
        "unsqueeze",
        "squeeze",
        "transpose",
        "detach",
    ),
    *("alias", "t", "permute", "expand", "split", "split_with_sizes", "as_strided"),
}
# Those that compute nothing where they return the memory that they were given.
NO_WORK_IN_PLACE = {"to", "contiguous", "resolve_neg", "resolve_conj"}


@dataclass(frozen=True)
class KeptCall:
    """A call of an op.

    Attributes:
        name: the op's.
        function: its address.
        tensors: those that the arguments point to.
    """

    name: str
    function: ctypes.c_void_p
    arguments: Any  # a structure, which has the fields of its op
    tensors: tuple[Tensor | None, ...]


class CapturedCalls:
    """The calls made while it was capturing.

    Attributes:
        graph_break: an op of torch among them, whose results a replay would lack; None: there is
            none.
        kept: the calls of ops.
        dry: they are kept and not made.
    """

    def __init__(self, *, dry: bool = False) -> None:
        self.graph_break: str | None = None
        self.kept: list[KeptCall] = []
        self.dry = dry
        self._calls: list[Call] = []
        self._parts: list[Callable[[], None]] = []
        self._library: ctypes.CDLL | None = None

    def add(
        self, library: ctypes.CDLL, name: str, arguments: ctypes.Structure, tensors: tuple
    ) -> None:
        """Keep a call, and the memory that it reads and writes."""
        function = ctypes.cast(getattr(library, f"qllm_{name}"), ctypes.c_void_p)
        self._calls.append(Call(function, ctypes.addressof(arguments)))
        self.kept.append(KeptCall(name, function, arguments, tensors))
        self._library = library

    @property
    def calls_back(self) -> bool:
        """Whether a function of Python is among them."""
        return bool(self._parts)

    def add_host_callback(self, function: Callable[[], None]) -> None:
        """Call a function of Python between the kernels before it and those behind it."""
        self._close_run()
        self._parts.append(function)

    def replay(self) -> None:
        """Make the calls again."""
        self._close_run()
        _take_number_of_threads()
        for part in self._parts:
            part()

    def _close_run(self) -> None:
        """Let the kernels so far be called at once."""
        if not self._calls:
            return
        calls, count = (Call * len(self._calls))(*self._calls), ctypes.c_int64(len(self._calls))
        library, self._calls = self._library, []
        assert library is not None  # there are calls of it

        def run() -> None:
            check(library, library.qllm_replay(calls, count), "a decode step")

        self._parts.append(run)


class _Watch(TorchDispatchMode):
    """Notes that an op of torch was run."""

    def __init__(self, calls: CapturedCalls) -> None:
        super().__init__()
        self.calls = calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler to keep it out of here, which takes a second."""
        return False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple = (),
        kwargs: dict | None = None,
    ) -> object:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        in_place = name in NO_WORK_IN_PLACE and result.data_ptr() == args[0].data_ptr()
        if name not in NO_WORK and not in_place:
            self.calls.graph_break = name
        return result


class _Capturing(threading.local):
    """Where calls of this thread are kept, None for nowhere."""

    calls: CapturedCalls | None = None

    def __init__(self) -> None:
        _take_number_of_threads()


def _take_number_of_threads() -> None:
    """Let kernels that this thread calls have as many threads as torch is set to have.

    OpenMP, which they ask, has a number for each thread that calls. Torch tells it the one that
    it is set to have when a thread first asks torch for it, and not before.
    """
    torch.get_num_threads()


_capturing = _Capturing()


@contextmanager
def capture_calls(*, dry: bool = False) -> Iterator[CapturedCalls]:
    """The calls that this thread makes inside.

    Args:
        dry: they are kept and not made.
    """
    before, _capturing.calls = _capturing.calls, CapturedCalls(dry=dry)
    try:
        with _Watch(_capturing.calls):
            yield _capturing.calls
    finally:
        _capturing.calls = before


def check(library: ctypes.CDLL, status: int, what: str) -> None:
    """Raise where a call did not do its work.

    Raises:
        MemoryError: there was none for what the kernel keeps in between.
        IndexError: an index is outside its table, such as a token outside the vocabulary.
    """
    if status != OK:
        kind = IndexError if status == BAD_INDEX else MemoryError
        raise kind(f"{what}: {library.qllm_message(ctypes.c_int64(status)).decode()}")


def call(
    library: ctypes.CDLL, name: str, arguments: ctypes.Structure, *tensors: Tensor | None
) -> None:
    """Call a kernel, and keep the call while calls are captured.

    Args:
        tensors: those that the arguments point to.

    Raises: what `check` does.
    """
    calls = _capturing.calls  # in front of the call, whose number of threads this may set
    if calls is None or not calls.dry:
        check(library, getattr(library, f"qllm_{name}")(ctypes.byref(arguments)), name)
    if calls is not None:
        calls.add(library, name, arguments, tensors)


def host_callback(function: Callable[[], None]) -> None:
    """Call a function that is no kernel, now and in every replay of what is being captured.

    Args:
        function: holds on to the tensors that it reads and writes, which keep their places.
    """
    if _capturing.calls is None:
        function()
        return
    calls, _capturing.calls = _capturing.calls, None  # what it calls itself, it calls again
    try:
        if not calls.dry:
            with _disable_current_modes():
                function()
    finally:
        _capturing.calls = calls
    calls.add_host_callback(function)
