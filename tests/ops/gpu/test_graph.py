"""When a decode step runs, is captured, and is replayed: on a GPU that is made up."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny
from oracle import load

from qllm import ops
from qllm.models import Decoder
from qllm.ops import phase, reference
from qllm.ops.capture import capture
from qllm.ops.gpu import attention
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
    def graph(self, graph: object, stream: object, capture_error_mode: str):
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
    graph.replay()
    assert made.events == ["capture", "run", "replay"]
    made.events.clear()
    graph.replay()
    graph.replay()
    assert made.events == ["replay"] * 2


def test_what_cannot_be_captured_runs_as_it_is(made, monkeypatch, capsys):
    @contextmanager
    def refused(graph: object, stream: object, capture_error_mode: str):
        yield
        raise torch.OutOfMemoryError("CUDA out of memory\nand more of it")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    graph = Graph(lambda: made.events.append("run"), torch.device("cuda", 0))
    for _ in range(3):
        made.events.clear()
        graph.replay()
        assert made.events[-1] == "run"
    assert made.events == ["run"]
    assert capsys.readouterr().err == (
        "note: steps are launched one by one, without a CUDA graph: CUDA out of memory\n"
    )


EXCHANGES = "it exchanges activations with other processes or devices"
BREAKS = {
    None: (attention.decode_attention, True),
    EXCHANGES: (attention.decode_attention, False),
    "there is no kernel of ours for its attention": (reference.decode_attention, True),
}


@pytest.mark.parametrize(("graph_break", "given"), BREAKS.items())
def test_a_step_that_cannot_be_a_graph_says_why(graph_break, given, made, monkeypatch):
    attend, alone = given
    monkeypatch.setattr(ops, "on", lambda device: SimpleNamespace(decode_attention=attend))
    step = capture(
        lambda: made.events.append("run"),
        torch.device("cuda"),
        no_graph=None if alone else EXCHANGES,
    )
    assert step.graph_break == graph_break and isinstance(step, Graph) == (graph_break is None)
    assert made.events.count("run") == 1
    step.replay()
    assert made.events[-1] == ("run" if graph_break else "replay")


def test_a_model_in_one_place_exchanges_nothing(monkeypatch):
    model = load(tiny("opt"), "4", num_shards=2)
    assert model._no_graph is None
    devices = {range(3): torch.device("cpu"), range(3, 6): torch.device("cpu:0")}
    monkeypatch.setattr(Decoder, "device_map", devices)
    assert model._no_graph == EXCHANGES


@pytest.mark.parametrize("ended", [0, 1, 3, 5])
def test_a_captured_step_takes_fewer_rows_than_it_was_captured_for(ended, monkeypatch):
    """On a GPU, where to capture takes long: what is left over computes the last row again."""
    model = load(tiny("llama"), "4")
    caches, prompts = [model.new_cache(9, 9) for _ in range(2)], [[i, 7] for i in range(9)]
    for cache in caches:
        model.prefill(prompts, cache)
        model.decode(torch.arange(9), cache)
        cache.keep(range(9 - ended))
    want = model.decode(torch.arange(9 - ended), caches[0])
    monkeypatch.setattr(Decoder, "device", SimpleNamespace(type="cuda"))
    sizes = {0: 9, 1: 8, 3: 8, 5: 4}
    assert model._step_size(caches[1]) == sizes[ended]
    monkeypatch.undo()
    monkeypatch.setattr(model, "_step_size", lambda cache: sizes[ended])
    for cache in caches[1:]:
        assert torch.equal(model.decode(torch.arange(9 - ended), cache), want)
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_step_is_decode_and_a_prompt_is_not(monkeypatch):
    model, seen = load(tiny("opt"), "4"), []
    for linear in (model.layers[0].mlp.up, model.lm_head):
        run = linear.forward
        monkeypatch.setattr(
            linear, "forward", lambda x, run=run: seen.append(phase.decoding()) or run(x)
        )
    cache = model.new_cache(2, 9)
    tokens = model.prefill([[5, 6], [7]], cache).argmax(-1)
    assert seen == [False, True]  # the head of last tokens is run as a step's
    model.prefill([[5]], last=False)
    assert seen[2:] == [False, False]
    model.decode(tokens, cache)
    assert seen[4:] == [True, True] and not phase.decoding()
