"""Launches captured as a CUDA graph, such as those of a decode step, so that they cost nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from qllm.errors import first_line


class Graph:
    """What a function launches, which is the same on every call and on the same memory.

    The first call runs it as it is, by which its kernels are compiled; the second captures it, and
    from then on it is replayed. It may not wait for the GPU, nor read what it computed. What cannot
    be captured, for want of memory or else, runs as it is, and a note says so.
    """

    def __init__(self, run: Callable[[], None], device: torch.device) -> None:
        self._run = run
        self.graph_break: str | None = None
        self._launch: Callable[[], None] | None = None
        # Not the default stream, on which nothing can be captured. Kernels that keep counters keep
        # them by stream: those that the first call makes are the graph's.
        self._stream = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def replay(self) -> None:
        """Launch it again."""
        if self._launch is None:
            self._launch = self._capture()
        self._launch()

    def _capture(self) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may ask for memory meanwhile, as one that runs layers ahead does.
            own = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
            with own:
                self._run()
        except RuntimeError as error:
            self.graph_break = first_line(error)
            print(
                f"note: steps are launched one by one, without a CUDA graph: {self.graph_break}",
                file=sys.stderr,
            )
            return self._run
        return graph.replay
