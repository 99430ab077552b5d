"""When a decode step runs, is captured, and is replayed: on a GPU that is made up."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from oracle import load

from qllm import ops
from qllm.ops import phase
from qllm.ops.gpu.graph import Graph


class Made:
    """What torch.cuda offers, and notes of what was asked of it.

    A capture runs the function, as a real one does; a replay makes the last one's calls again,
    which here is to run it once more.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.captured = None

    @contextmanager
    def stream(self, stream: object):
        self.events.append("on the side")
        yield

    @contextmanager
    def graph(self, graph: object, stream: object):
        self.events.append("capture")
        yield

    def CUDAGraph(self) -> object:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.events.append("replay"))

    def Stream(self, device: object) -> object:  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: self.events.append("wait"))

    current_stream = Stream


@pytest.fixture
def made(monkeypatch):
    made = Made()
    for name in ("stream", "graph", "CUDAGraph", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_it_runs_then_is_captured_then_replayed(made):
    graph = Graph(lambda: made.events.append("run"), torch.device("cuda", 0))
    # What came before is waited for, and what comes then waits for it.
    assert made.events == ["wait", "on the side", "run", "wait"]
    made.events.clear()
    graph.play()
    assert made.events == ["capture", "run", "replay"]
    made.events.clear()
    graph.play()
    graph.play()
    assert made.events == ["replay"] * 2


def test_what_cannot_be_captured_runs_as_it_is(made, monkeypatch, capsys):
    @contextmanager
    def refused(graph: object, stream: object):
        yield
        raise torch.OutOfMemoryError("CUDA out of memory\nand more of it")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    graph = Graph(lambda: made.events.append("run"), torch.device("cuda", 0))
    for _ in range(3):
        made.events.clear()
        graph.play()
        assert made.events[-1] == "run"
    assert made.events == ["run"]
    assert capsys.readouterr().err == (
        "note: steps are launched one by one, without a CUDA graph: CUDA out of memory\n"
    )


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_is_captured_where_it_is_in_one_place(whole, made, monkeypatch):
    model = load(tiny("opt"), "4", num_shards=2)
    monkeypatch.setattr(ops, "can_capture", lambda device: True)
    if not whole:
        model.device_map = [torch.device("cpu"), torch.device("cpu:0")]
    cache = model.new_cache(2, 9)
    tokens = model.prefill([[5, 6], [7]], cache).argmax(-1)
    model.decode(tokens, cache)
    assert isinstance(cache.tape, Graph) == whole
    if whole:
        model.decode(tokens, cache)
        assert made.events[-2:] == ["capture", "replay"]


def test_a_step_is_decode_and_a_prompt_is_not(monkeypatch):
    model, seen = load(tiny("opt"), "4"), []
    for linear in (model.layers[0].mlp.up, model.lm_head):
        run = linear.forward
        monkeypatch.setattr(
            linear, "forward", lambda x, run=run: seen.append(phase.decoding()) or run(x)
        )
    cache = model.new_cache(2, 9)
    tokens = model.prefill([[5, 6], [7]], cache).argmax(-1)
    assert seen == [False, False]
    model.decode(tokens, cache)
    assert seen == [False, False, True, True] and not phase.decoding()
