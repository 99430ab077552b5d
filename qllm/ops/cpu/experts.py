"""The step of a mixture of experts in one call, which chooses what is called."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qllm.ops.cpu import library
from qllm.ops.cpu.capture import KeptCall, capture_calls
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
        first: list[KeptCall] = []
        calls, kept, given = [], [], taken
        for expert in experts:
            with capture_calls(dry=True) as captured:
                out = expert(taken)
            found = captured.kept
            if captured.graph_break is not None or captured.calls_back or not found:
                return None
            if not first:
                first, given = found, out
            if [each.name for each in found] != [each.name for each in first]:
                return None  # such as one that reorders its inputs
            for call, same in zip(found, first, strict=True):
                arguments, between = call.arguments, {call.arguments.x, call.arguments.y}
                kept += [arguments, *(t for t in call.tensors if pointer(t) not in between)]
                # What lies between two calls is in the first expert's memory.
                arguments.x, arguments.y = same.arguments.x, same.arguments.y
                calls.append(Call(call.function, ctypes.addressof(arguments)))
        made = cls(calls, len(first), taken, given)
        made._kept = [*kept, *(call.tensors for call in first)]
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
