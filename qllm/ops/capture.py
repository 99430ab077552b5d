"""A step that is computed over and over on the same memory, captured: replayed without Python.

On CPUs it is a list of calls of our kernels (`cpu.capture`), on GPUs a CUDA graph (`gpu.graph`).
What else a step does breaks it up, and every step is then run as it is; the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from qllm import ops
from qllm.ops.cpu.capture import capture_calls
from qllm.ops.gpu.attention import decode_attention
from qllm.ops.gpu.graph import Graph


class CapturedStep(Protocol):
    """What `capture` returns.

    Attributes:
        graph_break: why every replay runs the step in Python; None: it does not.
    """

    graph_break: str | None

    def replay(self) -> None:
        """Compute the step again, on the same memory."""


class EagerStep:
    """A step that is run as it is, and why."""

    def __init__(self, step: Callable[[], None], graph_break: str) -> None:
        self.graph_break: str | None = graph_break
        self._step = step

    def replay(self) -> None:
        self._step()


def capture(
    step: Callable[[], None], device: torch.device, *, no_graph: str | None
) -> CapturedStep:
    """Run a step once, and keep how it is run again.

    Args:
        step: reads and writes the same tensors whenever it is called.
        device: on which it runs.
        no_graph: why a CUDA graph cannot hold it; None: it can.
    """
    if device.type == "cuda":
        own = ops.on(device.type).decode_attention is decode_attention
        # The reference's launches depend on how many tokens there are.
        reason = no_graph if own else "there is no kernel of ours for its attention"
        if reason is None:
            return Graph(step, device)
        step()
        return EagerStep(step, reason)
    with capture_calls() as calls:
        step()
    if calls.graph_break is None:
        return calls
    return EagerStep(step, f"torch computes a part of it ({calls.graph_break})")
