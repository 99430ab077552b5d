"""What stages take besides their part of a model is told from what they take together."""

from __future__ import annotations

import json

import pytest
import torch

from qllm.config import QuantSpec
from qllm.plan import cached, network
from qllm.plan.devices import DescribedSpeed
from qllm.plan.network import _beside_layers


@pytest.mark.parametrize(
    ("stages", "share", "turn", "busy"),
    [
        (2, 0.25, 2 + 6, 12 + 2 * 5),
        (2, 0.5, 2 + 6, 12 + 2 * 5),
        (2, 1.0, 2 * 8, 2 * 22),
        (3, 0.5, 1.5 * (4 / 3 + 6), 1.5 * 27),
    ],
)
def test_what_a_stage_takes_besides_does_not_count_what_others_have_its_processors_for(
    stages, share, turn, busy
):
    """By hand: layers take 12 s a step and 4 s a prompt; all at work take 5 and 6 s more each."""
    hops = stages - 1
    prompt = 4.0 + stages * 7 + hops * 0.5
    measured = {
        "alone": [4.0 + 1.0, 12.0 + 2.0],
        "one": [prompt, 12.0 + stages * 3 + 2 * hops * 0.5],
        "all": [prompt + hops * turn, float(busy)],
    }
    passes = {"prefill": 1.0, "decode": 2.0}
    found = _beside_layers(measured, stages, 0.5, share, passes)
    want = {"prefill": 7.0, "busy_prefill": 6.0, "decode": 3.0, "busy_decode": 5.0}
    assert found == pytest.approx(want)


@pytest.mark.parametrize(("threads", "busy"), [(1, 12 * 1.25), (2, 2 * 12 * 1.25), (2, 12.0)])
def test_stages_of_what_no_cache_keeps_tell_contention_and_what_their_steps_take_on_top(
    monkeypatch, threads, busy
):
    """By hand: layers of 12 s a step, and where caches keep them nothing besides; 2 processors."""
    near = {"alone": (4.0, 12.0), "one": (4.0, 12.0)}
    far_one = {"one": (4.0, 12.0 + 2 * 3.0)}, {"one": (4.0, 12.0 + 3 * 5.0)}
    two = {
        "near": near | {"all": (6.0, 12.0 * threads)},
        "far": near | {"all": (6.0, busy)} | far_one[0],
        "hops": [0.0, 0.0],
    }
    three = dict.fromkeys(("near", "far"), near | {"all": (8.0, 18.0 * threads)})
    three["far"] = three["far"] | far_one[1]
    answers = iter([json.dumps(two), json.dumps(three)])
    monkeypatch.setattr(network, "run_ranks", lambda *_: next(answers))
    monkeypatch.setattr(network, "usable_cpus", lambda: 2)
    _, beside = network.measure_stages(threads, torch.float16, DescribedSpeed(1.0, 1.0, 1.0))
    assert beside["contention"] == pytest.approx(max(0.0, busy / threads / 12 - 1))
    nothing = dict.fromkeys(("decode", "busy_decode"), 0.0)
    for key, far in (("stage_passes", 3.0), ("crowding", 2.0)):
        found = beside[key]
        assert {name: found[name] for name in nothing} == nothing
        assert found["far_decode"] == pytest.approx(far)


def test_of_a_gpu_hops_are_measured_alone(monkeypatch):
    """What a GPU takes says nothing of stages on the CPU, of which what it takes was subtracted."""
    asked: list[tuple] = []

    def run_ranks(module: str, told: dict, threads: list[int], what: str) -> str:
        asked.append((told, threads))
        return json.dumps({"hops": [0.25, 0.25 + (network.LARGE - network.SMALL) * 16]})

    monkeypatch.setattr(network, "run_ranks", run_ranks)
    monkeypatch.setattr(cached, "probe", lambda *_: DescribedSpeed(1.0, 1.0, 1.0))
    monkeypatch.setattr(DescribedSpeed, "to_json", lambda self: {}, raising=False)
    monkeypatch.setattr(cached.ops, "prepare", lambda device: None)
    monkeypatch.setattr(cached, "available_bytes", lambda device: 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = cached.describe_machine([QuantSpec()], None, "cuda:0", iter)
    assert asked == [({"dtype": None}, [3, 3])]
    assert found["network"] == {"latency": 0.25, "bandwidth": pytest.approx(1.0)}
    assert set(found["devices"][0]) == {"name", "host", "memory", "measured"}


@pytest.mark.slow
def test_hops_of_two_processes():
    found = network.measure_hops(1)
    assert 0 < found["latency"] < 1 and found["bandwidth"] > 0
