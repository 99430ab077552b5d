"""Launches captured as a CUDA graph, such as those of a decode step, so that they cost nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Graph:
    """What a function launches, which is the same on every call and on the same memory.

    The first call runs it as it is, by which its kernels are compiled; the second captures it, and
    from then on it is replayed. It may not wait for the GPU, nor read what it computed.
    """

    foreign = None  # nothing keeps it from being replayed

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None
        # Not the default stream, on which nothing can be captured. Kernels that keep counters keep
        # them by stream: those that the first call makes are the graph's.
        self._stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def play(self) -> None:
        """Launch it again."""
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._run()
            self._graph = graph
        self._graph.replay()
