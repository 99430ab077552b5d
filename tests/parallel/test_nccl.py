"""What ranks on GPUs exchange goes over NCCL: with one rank, which needs one GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import tiny
from oracle import load

from qllm.models import Decoder
from qllm.parallel.group import Group
from qllm.parallel.links import Links

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def group():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Group((0,), 0, Links({}, lambda *error: None), dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_a_sum(group):
    x = torch.randn(3, 40, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(40, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(group.all_reduce(x, bias), x + bias)
    assert torch.equal(group.all_gather(x, [40]), x)


def test_parts_come_together(group):
    x = torch.randn(3, 40, device="cuda")
    out = torch.empty_like(x)
    group._collect_many(x, [out])
    assert torch.equal(out, x)


def test_a_model_is_not_captured_among_others(group, monkeypatch):
    monkeypatch.setattr(Decoder, "_one_device", False)
    model = load(tiny("opt"), "4", device="cuda")
    cache = model.new_cache(1, 8)
    tokens = model.prefill([[5, 6]], cache).argmax(-1)
    for _ in range(3):
        tokens = model.decode(tokens, cache).argmax(-1)
    assert cache.captured.graph_break is not None
