"""What attention of a decode step takes on top where no cache of the processor keeps its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from qllm import ops
from qllm.ops import phase
from qllm.ops.capture import capture
from qllm.ops.kv import KV, Batch, zeros

SEQUENCES, HEADS, CHANNELS = 4, 8, 64
# Of two shapes, which tell what a head takes from what its bytes do; the one divides the other.
TOKENS = (128, 1024)

Call = tuple[Callable[[], object], int]


class FarCaches:
    """Caches of keys and values, of each of TOKENS, in the same memory.

    Args:
        near, far: bytes of those that are kept by some cache of the processor, and of all.
    """

    def __init__(self, near: int, far: int, dtype: torch.dtype, device: str) -> None:
        self._dtype, self._device, self._near = dtype, device, near
        longest = self._bytes(max(TOKENS))
        held = zeros((-(-far // longest) * longest // dtype.itemsize,), dtype, device)
        held.fill_(0.01)
        self._caches = {
            tokens: [KV(*part) for part in held.view(-1, 2, SEQUENCES, HEADS, tokens, CHANNELS)]
            for tokens in TOKENS
        }

    def _bytes(self, tokens: int) -> int:
        return SEQUENCES * HEADS * 2 * tokens * CHANNELS * self._dtype.itemsize

    def calls(self) -> Iterator[tuple[tuple[int, bool], Call]]:
        """Attention of caches in turn, and their number; by tokens, and whether they are far."""
        attend = ops.on(torch.device(self._device).type).decode_attention
        shape = SEQUENCES, 3 * HEADS * CHANNELS
        qkv = torch.ones(shape, dtype=self._dtype, device=self._device)
        for tokens, caches in self._caches.items():
            batch = Batch.of([1] * SEQUENCES, self._device, pasts=[tokens - 1] * SEQUENCES)
            for far in (False, True):
                some = caches if far else caches[: max(1, self._near // self._bytes(tokens))]

                def run(some: list[KV] = some, batch: Batch = batch) -> None:
                    # Here, since a GPU's graph is captured when it is replayed first.
                    with phase.decode():
                        for kv in some:
                            attend(qkv, kv, batch, None, None)

                with torch.inference_mode():
                    step = capture(run, torch.device(self._device), no_graph=None)
                yield (tokens, far), (step.replay, len(some))

    def seconds(self, measured: Mapping[tuple[int, bool], float]) -> tuple[float, float]:
        """Of a byte, and of a head of a sequence, on top: from the seconds of calls."""
        more = [max(0.0, measured[tokens, True] - measured[tokens, False]) for tokens in TOKENS]
        few, many = map(self._bytes, TOKENS)
        byte = min(max(0.0, (more[1] - more[0]) / (many - few)), more[1] / many)
        return byte, max(0.0, more[0] - byte * few) / (SEQUENCES * HEADS)
