"""Calls of the kernels that are captured and replayed, and what breaks a graph of them."""

from __future__ import annotations

import threading

import pytest
import torch
from cpu_paths import normal, same
from torch import Tensor

from qllm.ops.cpu import steps
from qllm.ops.cpu.capture import capture_calls

pytestmark = pytest.mark.usefixtures("one_thread", "cpu_kernels")


def test_a_replay_makes_calls_on_the_memory_they_had():
    x, z = normal(2, 5, 40)
    with capture_calls() as captured:
        y = steps.activation(steps.add(x, z), "relu")
    assert captured.graph_break is None
    for _ in range(3):
        x.normal_()
        want = (x + z).relu()
        captured.replay()
        assert same(y, want)


def test_only_what_is_inside_is_captured():
    x = normal(2, 40)
    steps.add(x, x)
    with capture_calls() as outer:
        first = steps.add(x, x)
        with capture_calls() as inner:
            second = steps.add(x, x)
        third = steps.add(x, x)
    fourth = steps.add(x, x)
    x.fill_(1)
    inner.replay()
    assert (second == 2).all() and not (first == 2).all()
    x.fill_(2)
    outer.replay()
    assert (first == 4).all() and (third == 4).all() and (second == 2).all()
    assert not (fourth == 4).any()


def test_another_thread_s_calls_are_not_captured():
    x, results = normal(2, 40), []

    def run() -> None:
        results.append(steps.add(x, x))
        with capture_calls() as own:
            results.append(steps.add(x, x))
        own.replay()

    with capture_calls() as captured:
        mine = steps.add(x, x)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        also_mine = steps.add(x, x)
    x.fill_(1)
    captured.replay()
    assert (mine == 2).all() and (also_mine == 2).all()
    assert not any((result == 2).any() for result in results)


def graph_break(run, *tensors: Tensor) -> str | None:
    """The op of torch in a function that a replay would lack."""
    with torch.inference_mode(), capture_calls() as captured:
        run(*tensors)
    return captured.graph_break


def test_what_computes_nothing_breaks_no_graph():
    x = normal(6, 40)
    for run in (
        lambda x: x.view(3, 80)[:2].unsqueeze(1).expand(2, 5, 80).transpose(0, 1),
        lambda x: x.t().split([30, 10])[1].new_empty(5),
        lambda x: torch.empty_like(x).permute(1, 0).squeeze().detach(),
        lambda x: (x.contiguous(), x.to(torch.float32), x.to("cpu")),
        lambda x: steps.add(x, x),
    ):
        assert graph_break(run, x) is None


def test_what_computes_or_copies_breaks_the_graph():
    x = normal(6, 40)
    for run in (
        lambda x: x + 0,
        lambda x: x.add_(0),
        lambda x: x.clone(),
        lambda x: x.t().contiguous(),
        lambda x: x.to(torch.float16),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x[0, 0].item(),
        lambda x: torch.zeros(3),
        lambda x: torch.cat([x, x]),
        lambda x: x.copy_(x),
        lambda x: x.float().half(),
        lambda x: torch.nn.functional.linear(x, x),
        lambda x: torch.nn.functional.layer_norm(x, (40,)),
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        lambda x: steps.add(x, x.half()),
    ):
        assert graph_break(run, x.clone()) is not None
