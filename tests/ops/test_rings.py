"""A row of a layer with a window in less memory than it has tokens: the same, wherever it runs."""

from __future__ import annotations

import pytest
import torch
from cpu_paths import normal, on, paths, same

from qllm.ops import reference
from qllm.ops.cpu import steps
from qllm.ops.kv import KV, RUN, Batch, Scores, ring_capacity
from qllm.ops.quantized_kv import QuantizedKV

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW, LENGTH = 70, 5 * RUN + 9
PIECES = (20, 1, 20, 9, 14, 20)  # of a prompt: their ends meet those of runs, too


def test_a_ring_has_all_runs_that_a_pass_touches():
    for window in (1, 2, 63, 64, 65, 200):
        for tokens in (1, 2, 63, 64, 65, 129):
            touched = max(
                (past + tokens - 1) // RUN - max(0, past + 1 - window) // RUN + 1
                for past in range(5 * RUN)
            )
            assert ring_capacity(window, tokens) == touched * RUN


@pytest.mark.parametrize("path", ["reference", *paths()])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_results_are_those_of_a_row_that_holds_all(bits, path):
    heads, kv_heads, dim = {16: (4, 2, 20), 8: (2, 1, 64), 4: (3, 3, 16)}[bits]
    kind, dtype = (KV, torch.bfloat16) if bits == 16 else (QuantizedKV, torch.float32)
    qkv = normal(LENGTH, (heads + 2 * kv_heads) * dim, dtype=dtype)
    slopes = torch.linspace(0.01, 0.2, heads) if bits == 8 else None
    scores = Scores(window=WINDOW, cap=3.0 if bits == 4 else 0.0)
    ring, whole = (
        kind.empty(bits, 2, kv_heads, capacity, dim, dtype, "cpu")
        for capacity in (ring_capacity(WINDOW, max(PIECES)), 6 * RUN)
    )
    assert ring.capacity == 3 * RUN

    def run(length: int, past: int, last: bool) -> None:
        ops = reference if path == "reference" else steps
        attend = ops.decode_attention if length == 1 else ops.prefill_attention
        batch = Batch.of([length], "cpu", rows=[1], pasts=[past])._replace(last=last)
        found = [
            attend(qkv[past : past + length], kv, batch, None, slopes, scores)
            for kv in (ring, whole)
        ]
        assert same(*found)

    past = 0
    with on("scalar" if path == "reference" else path):
        while past < LENGTH:
            length = min(PIECES[past % len(PIECES)], LENGTH - past)
            run(length, past, last=length > 1 and past % 3 == 0)
            past += length
