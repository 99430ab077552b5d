"""What a probe finds can be predicted from, and it leaves the process as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qllm import ops
from qllm.config import QuantSpec
from qllm.ops import phase
from qllm.ops.cpu import library, linear
from qllm.parallel.group import Group
from qllm.parallel.pipeline import ParallelContext
from qllm.plan import far_cache, probe, probed_models
from qllm.plan.cluster_file import read_cluster
from qllm.plan.devices import PHASES, HalfWork
from qllm.plan.random_model import random_decoder
from qllm.plan.shape import sees_last_token

FOUR = QuantSpec(4, group_size=64, kind="weight_only")


@pytest.fixture
def small(monkeypatch):
    """Matrices and models that take milliseconds."""
    monkeypatch.setattr(probe, "WORKING_SETS", (1 << 16, 1 << 17, 1 << 18, 1 << 19))
    monkeypatch.setattr(probe, "SMALL", ((64, 64), (64, 128), (128, 64), (128, 128)))
    monkeypatch.setattr(probe, "LEAST", (64, 64))
    monkeypatch.setattr(probe, "LARGE", (256, 256))
    monkeypatch.setattr(probe, "SECONDS", 0.001)
    monkeypatch.setattr(probed_models, "FAMILIES", (("llama", 16, 2), ("opt", 8, 1)))
    monkeypatch.setattr(
        probed_models, "MODELS", ((64, 1, 64), (64, 1, 512), (64, 2, 64), (128, 1, 64))
    )
    monkeypatch.setattr(probed_models, "WORK", ((1, 8), (2, 8), (1, 64)))
    monkeypatch.setattr(probed_models, "FAR_FAMILIES", (("opt", 16, 1),))
    monkeypatch.setattr(probed_models, "FAR_MODELS", ((128, 4, 64),))
    monkeypatch.setattr(probed_models, "FAR_WORK", ((1, 8),))
    monkeypatch.setattr(probed_models, "STEPS", 4)
    monkeypatch.setattr(far_cache, "TOKENS", (8, 64))


@pytest.mark.usefixtures("small")
def test_what_is_measured_predicts(tmp_path):
    before, asked = torch.get_num_threads(), []
    found = probe.Probe([FOUR], torch.float32, "cpu", threads=before + 1)
    for _ in range(2):
        asked.append(torch.get_num_threads())
        found.measure()
    speed = found.speed()
    assert asked == [before, before] and torch.get_num_threads() == before
    path = tmp_path / "here.json"
    device = {"name": "here", "memory": "1GB", "measured": speed.to_json()}
    path.write_text(json.dumps({"devices": [device]}))
    again = read_cluster(path).devices[0].speed
    assert again == speed
    for spec in (FOUR, QuantSpec()):
        for decode in (True, False):
            one, many = (
                again.linear(spec, (512, 512), 0, rows, decode=decode, model=1e9)
                for rows in (1, 4096)
            )
            assert 0 < one < many
    assert all(again.step(1, decode=name == "decode") >= 0 for name in PHASES)
    work = HalfWork(64, 512, 4096, 4096, 8)
    # A whole pass takes something besides its products, wherever the fit puts it.
    assert again.step(1, decode=True) + again.half(work, decode=True, model=1e6) > 0


@pytest.mark.usefixtures("small")
def test_what_passes_take_on_top_in_models_is_told(monkeypatch):
    monkeypatch.setattr(probed_models, "FAR_MODELS", ((128, 4, 64), (64, 16, 64), (128, 1, 2048)))
    found = probe.Probe([FOUR], torch.float32, "cpu")
    near = probe.WORKING_SETS[1]
    for spec, name, nbytes, size, rows in found._products:
        weight = 1e-10 if nbytes <= near else 3e-10
        found._times[spec, name, nbytes, size, rows] = [weight * size[0] * size[1] * rows]
    for call in found._attention:
        found._times["attention", call] = [1e-6]
    models = found._models
    for kind in models.models:
        for batch, context in kind.work():
            for name in PHASES:
                models.times[name, kind, batch, context] = [1.0]
    alone = replace(found.speed(), among_others=dict.fromkeys(PHASES, 0.0))
    for kind, model in models.models.items():
        held = sum(module.nbytes() for module in probed_models.linears(model).values())
        for batch, context in kind.work():
            scores = kind.layers * batch * kind.hidden / kind.channels * (context + 2)
            held_with_cache = held + 8 * scores * kind.channels / kind.sharing
            far = alone.farness(held_with_cache)
            products = probed_models.products_of(
                model, FOUR, alone, batch, batch, held_with_cache, decoding=True
            )
            step = products * (1 + 0.25 * far) + 2 * kind.layers * (1e-6 + 4e-6 * far)
            models.times["decode", kind, batch, context] = [step]
            rows = batch * context
            prompt = probed_models.products_of(
                model, FOUR, alone, rows, batch, held, decoding=False
            )
            models.times["prefill", kind, batch, context] = [1.5 * prompt + 2e-6 * kind.layers]
    told = found.speed()
    assert told.halves["decode"][:2] == pytest.approx((1e-6, 4e-6), rel=1e-3)
    assert told.among_others == pytest.approx({"decode": 0.25, "prefill": 0.5}, rel=1e-3)
    assert told.halves["prefill"][1] == 0


def test_what_far_caches_take_is_told_from_their_bytes_and_heads():
    caches = far_cache.FarCaches(1 << 20, 1 << 20, torch.float16, "cpu")
    heads = far_cache.SEQUENCES * far_cache.HEADS
    bytes_of = {t: 4 * heads * t * far_cache.CHANNELS for t in far_cache.TOKENS}
    measured = {(t, False): 1e-5 for t in bytes_of}
    measured |= {(t, True): 1e-5 + 2e-11 * n + 3e-7 * heads for t, n in bytes_of.items()}
    assert caches.seconds(measured) == pytest.approx((2e-11, 3e-7))
    assert caches.seconds(dict.fromkeys(measured, 1e-5)) == (0, 0)


def test_one_pass_that_takes_longer_does_not_move_what_the_others_say():
    draw = np.random.default_rng(0)
    coefficients, features = np.array([3.0, 0.0, 0.5]), draw.uniform(1, 2, (12, 3))
    seconds = features @ coefficients + 1.0
    seconds[5] *= 2
    rows = [(list(each), float(s), 1.0) for each, s in zip(features, seconds, strict=True)]
    assert probed_models.fit(rows) == pytest.approx(tuple(coefficients), abs=1e-6)


def test_matrices_take_the_memory_that_they_say(monkeypatch):
    # One of its own: what of a first one others had before would count here.
    monkeypatch.setattr(linear, "_arena", library.Arena())
    matrices = probe.Matrices(torch.float16, "cpu")
    few, many = (matrices(FOUR, (1024, 1024), nbytes) for nbytes in (4 << 20, 16 << 20))
    assert list(few) == list(many[: len(few)])
    storages = {
        b.untyped_storage().data_ptr(): b.untyped_storage() for m in many for b in m.buffers()
    }
    held = sum(m.nbytes() for m in many)
    assert 16 << 20 <= held < (16 << 20) + many[0].nbytes()
    assert sum(each.nbytes() for each in storages.values()) < 3 * held


def test_what_sees_the_last_token_alone():
    names = [f"layers.{i}.{n}" for i in (0, 11) for n in ("attention.qkv", "attention.out")]
    names += ["layers.11.mlp.up", "layers.1.mlp.up", "layers.111.mlp.up", "lm_head"]
    seen = [name for name in names if sees_last_token(name, 12)]
    assert seen == ["layers.11.attention.out", "layers.11.mlp.up", "lm_head"]


@pytest.mark.parametrize(("rank", "layers"), [(0, range(2)), (1, range(2, 3)), (2, range(3, 4))])
def test_a_stage_of_a_random_model_runs_its_own_layers_alone(rank, layers):
    """What it took for those of others was counted as what stages take besides their layers."""
    parallel = ParallelContext(pp=Group((0, 1, 2), rank))
    model = random_decoder("opt", 8, 1, 32, 4, FOUR, torch.float32, "cpu", parallel=parallel)
    assert list(model.device_map) == [layers]
    assert [layer.has_attention for layer in model.layers] == [i in layers for i in range(4)]


@pytest.fixture
def replayed_later(monkeypatch):
    """A capture runs what it is given whenever it is replayed, as a GPU's graph first does."""

    def capture(run, device, *, no_graph):
        return SimpleNamespace(replay=run)

    for module in (probe, far_cache):
        monkeypatch.setattr(module, "capture", capture)


@pytest.mark.usefixtures("replayed_later")
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_products_of_steps_are_those_of_steps_whenever_they_are_captured(name):
    seen: list[bool] = []

    class Product:
        in_features = 4

        def __call__(self, x: torch.Tensor) -> None:
            seen.append(phase.decoding())

    run, count = probe._product([Product()], 1, torch.float32, "cpu", name)
    seen.clear()
    run()
    assert count == 1 and seen == [name == "decode"] and not phase.decoding()


@pytest.mark.usefixtures("replayed_later")
def test_products_of_prompts_go_through_all_matrices_two_at_a_time():
    """The same two again would come from caches, where a model's come from memory."""
    seen: list[int] = []

    class Product:
        in_features = 4

        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self, x: torch.Tensor) -> None:
            seen.append(self.number)

    run, count = probe._product(list(map(Product, range(5))), 1, torch.float32, "cpu", "prefill")
    for _ in range(5):
        run()
    assert count == 2 and seen == [*range(5), *range(5)]


@pytest.mark.usefixtures("replayed_later")
def test_attention_of_steps_is_that_of_the_device_whatever_its_number(monkeypatch):
    asked: list[str] = []
    seen: list[bool] = []

    def on(device: str) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(decode_attention=lambda *_: seen.append(phase.decoding()))

    monkeypatch.setattr(ops, "on", on)
    for _, (run, _) in far_cache.FarCaches(1 << 20, 1 << 20, torch.float16, "cpu:0").calls():
        run()
    assert asked == ["cpu"] and set(seen) == {True}
