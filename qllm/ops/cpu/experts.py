"""The step of a mixture of experts in one call, which chooses what is called."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qllm.ops.cpu import library
from qllm.ops.cpu.capture import capture_calls
from qllm.ops.cpu.interface import Call, Experts
from qllm.ops.cpu.library import TYPES, pointer

ROWS = 32  # tokens that an expert takes at a time, no more than MAX_TAKEN of kernels.h
Expert = Callable[[Tensor], Tensor]


class ExpertCalls:
    """What some experts call, to be called of the tokens that take them.

    All experts read and write the same memory, one after the other; a step of another thread waits.
    """

    def __init__(self, calls: Sequence[Call], each: int, taken: Tensor, given: Tensor) -> None:
        """
        Args:
            calls: of all experts, each of which makes `each`.
            taken, given: (ROWS, C), what an expert takes and what it gives.
        """
        self._calls, self._each = (Call * len(calls))(*calls), each
        self._taken, self._given = taken, given
        self._kept: list[object] = []  # what the calls point to

    @classmethod
    def of(cls, experts: Iterable[Expert], like: Tensor) -> ExpertCalls | None:
        """Those of some experts, of rows such as `like` (N, C) has.

        None where torch does a part of their work, or they exchange something with other processes.
        """
        taken = like.new_empty(ROWS, like.shape[1])
        calls: list[Call] = []
        kept: list[object] = []
        places = [taken]  # what the first call reads, and what each writes
        names: list[str] = []
        for expert in experts:
            with capture_calls(dry=True) as captured:
                expert(taken)
            found = captured.kept
            if captured.graph_break is not None or captured.calls_back or not found:
                return None
            names = names or [call.name for call in found]
            if [call.name for call in found] != names:
                return None  # such as one that reorders its inputs
            at: dict[int | None, int] = {pointer(taken): 0}
            for index, call in enumerate(found, 1):
                at[call.arguments.y] = index
                written = next(t for t in call.tensors if pointer(t) == call.arguments.y)
                assert written is not None
                if index == len(places):
                    places.append(written)
                elif written.nbytes > places[index].nbytes:
                    places[index] = written  # such as of a shared expert, which is wider
                between = {call.arguments.x, call.arguments.y}
                kept += [call.arguments, *(t for t in call.tensors if pointer(t) not in between)]
                # Memory that is the same for all experts, put in below.
                call.arguments.x, call.arguments.y = at[call.arguments.x], index
                calls.append(Call(call.function, ctypes.addressof(call.arguments)))
        for arguments in kept:
            if isinstance(arguments, ctypes.Structure):
                arguments.x, arguments.y = (
                    pointer(places[index or 0]) for index in (arguments.x, arguments.y)
                )
        made = cls(calls, len(names), taken, places[-1])
        made._kept = [*kept, *places]
        return made

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the experts that each row of x (N, C) takes give, times their weights.

        Args:
            weights, chosen: of `reference.route`.
        """
        x = x.contiguous()
        rows, channels = x.shape
        total, y = torch.empty(rows, channels), torch.empty_like(x)
        shape = (rows, channels, len(self._calls) // self._each, chosen.shape[1])
        arguments = Experts(
            *shape,
            self._each,
            ROWS,
            TYPES[x.dtype],
            pointer(x),
            pointer(weights),
            pointer(chosen),
            ctypes.addressof(self._calls),
            pointer(self._taken),
            pointer(self._given),
            pointer(total),
            pointer(y),
        )
        library.run("experts", arguments, x, weights, chosen, total, y)
        return y
