"""Layers run once while others are read, by which their GPU kernels are compiled, and loaded.

Triton and NVRTC compile a kernel for what a layer needs when one first asks for it, which takes
seconds; to load what they made before takes less, yet all of a model's may take longer than to read
it. They release Python's lock, and so does what reads weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch

from qllm import ops
from qllm.layers import Linear
from qllm.models import Decoder
from qllm.models.passes import Decode


class Rehearsal:
    """Runs the first layer of each kind, once it is whole, on a thread of its own.

    It does nothing where no kernels are compiled, and where layers exchange anything with other
    processes. What goes wrong here goes wrong again where the layer is needed, and is said there.
    """

    def __init__(
        self, model: Decoder, prompts: Sequence[int], cache_shape: tuple[int, int]
    ) -> None:
        """
        Args:
            prompts: tokens of each of the prompts that will come; none: steps alone are run.
            cache_shape: rows and tokens of the KV cache that will be there.
        """
        rows, capacity = cache_shape
        self._model, self._prompts = model, prompts
        self._shape = (len(prompts) or max(1, rows), max([2, capacity, *(n + 1 for n in prompts)]))
        self._known: set[Hashable] = set()
        alone = model.stage is None and model.parallel.tp.size == 1
        compiles = ops.compiles(model.device.type)
        self._thread = ThreadPoolExecutor(1, "rehearsal") if alone and compiles else None

    def __enter__(self) -> Self:
        return self

    def layer(self, index: int) -> None:
        """Take note that a layer is whole."""
        if self._thread is None or (kind := self._kind(index)) in self._known:
            return
        if self._model.device_of_layer(index) != self._model.device:
            return
        self._known.add(kind)
        self._thread.submit(self._run, index)

    def _kind(self, index: int) -> Hashable:
        """What a layer's kernels depend on."""
        windows, rotation = self._model.config.windows, self._model.positions.kind(index)
        linears = (
            (type(each), each.spec, each.in_features, each.out_features)
            for each in self._model.layers[index].modules()
            if isinstance(each, Linear)
        )
        return (windows[index] if windows else 0, rotation, *linears)

    def _run(self, index: int) -> None:
        with suppress(Exception):
            self._rehearse(self._model.only(index))

    @torch.inference_mode()
    def _rehearse(self, layer: Decoder) -> None:
        cache = layer.new_cache(*self._shape)
        if self._prompts:
            layer.hidden([[0] * length for length in self._prompts], cache)
        step = Decode(cache, layer.positions, self._shape[0])
        step.begin(torch.zeros(step.size, dtype=torch.int64, device=layer.device))
        layer.hidden_step(step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._thread is not None:
            self._thread.shutdown(wait=error is None, cancel_futures=error is not None)
