"""Clusters: what a file may say, and what is said of one that is wrong."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.plan.devices import Cluster, HalfWork, MeasuredSpeed, parse_bytes

GOOD = {"name": "gpu", "memory": "10GB", "bandwidth": "900GB", "flops": 1e14}


def read(tmp_path, value) -> Cluster:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(value))
    return Cluster.from_file(path)


def test_the_example_is_read():
    cluster = Cluster.from_file(ROOT / "examples" / "cluster.json")
    assert [d.name for d in cluster.devices] == ["v100.0", "v100.1", "v100.2", "a100"]
    assert [d.memory for d in cluster.devices] == [32e9] * 3 + [40e9]
    assert cluster.hop(1e6) == pytest.approx(2e-5 + 8e-5)
    v100, a100 = cluster.devices[0].speed, cluster.devices[-1].speed
    job = (QuantSpec(4), (10**4, 10**4), 5 * 10**7)
    # One row waits for memory, many for arithmetic.
    slow, fast = (s.linear(*job, 1, decode=True, model=1e9) for s in (v100, a100))
    assert slow / fast == pytest.approx(1555 / 900)
    slow, fast = (s.linear(*job, 4096, decode=False, model=1e9) for s in (v100, a100))
    assert slow / fast == pytest.approx(312 / 112)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"devices": []}, "names no devices"),
        ({"devices": [GOOD], "net": 1}, "a cluster is"),
        ({"devices": [GOOD | {"speed": 3}]}, "device 'gpu': 'speed' is unknown"),
        ({"devices": [GOOD | {"measured": {}, "wakeup": 3}]}, "measure again: --probe"),
        ({"devices": [{"name": "gpu"}]}, "device 'gpu' has no memory"),
        ({"devices": [{"memory": "1GB"}]}, "a device is an object with a name"),
        ({"devices": [GOOD | {"memory": "much"}]}, "memory 'much' is no size"),
        ({"devices": [GOOD | {"memory": -1}]}, "memory -1 is no size"),
        ({"devices": [GOOD | {"count": 0}]}, "count 0 is no number of devices"),
        ({"devices": [GOOD | {"flops": None}]}, "flops is None; give a number"),
        ({"devices": [GOOD], "network": {"latency": -1}}, "latency -1 cannot be"),
        ({"devices": [GOOD], "network": {"delay": 1}}, "a network has bandwidth and latency"),
        ({"devices": [{"name": "x", "memory": 1, "measured": {}}]}, "measured is not what"),
        ({"devices": [GOOD | {"processors": 0}]}, "processors 0 is no number of processors"),
        ({"devices": [GOOD | {"stage_passes": [1]}]}, "stage_passes is seconds of"),
        ({"devices": [GOOD | {"crowding": {"decode": -1}}]}, "crowding: decode -1"),
        ({"devices": [GOOD | {"contention": -1}]}, "contention -1 cannot be"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, value, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, value)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match="there is no such file"):
        Cluster.from_file(ROOT / "no.json")


def test_measured_speeds_are_what_was_measured(tmp_path):
    same = 1e-10, 1e-10, 3e-10, 3e-10
    table = {"1": (1e-5, 1e-9, *same), "8": (2e-5, 2e-9, *(2 * each for each in same))}
    speed = MeasuredSpeed(
        {"decode": {"4:g128:asym": table, "16": table}, "prefill": {"4:g128:asym": table}},
        {"decode": (1e-6, 1e-9, 1e-11, 2e-12), "prefill": (2e-6, 0.0, 0.0, 3e-10)},
        (1e-11, 2e-11, 1e-7),
        {"decode": (5e-6, 2e-6, 1e-9), "prefill": (1e-3, 0.0, 0.0)},
        (5e5, 1e6, 4e6, 8e6),
    )
    beside = {"stage_passes": {"decode": 2e-5}, "crowding": {"prefill": 1e-4}, "processors": 2}
    beside |= {"contention": 0.25}
    device: dict = {"name": "here", "memory": 1e9, "measured": speed.to_json(), **beside}
    (found,) = read(tmp_path, {"devices": [device]}).devices
    again = found.speed
    assert again == speed and found.processors == 2
    nothing = dict.fromkeys(("prefill", "busy_prefill", "decode", "busy_decode"), 0.0)
    assert found.stage_passes == nothing | {"decode": 2e-5}
    assert found.crowding == nothing | {"prefill": 1e-4} and found.contention == 0.25
    assert [again.step(4, decode=decode) for decode in (True, False)] == [5e-6 + 4 * 2e-6, 1e-3]
    assert again.logits(4 * 1000, decode=True) == pytest.approx(4e-6)
    four, size = QuantSpec(4, kind="weight_only"), (500, 2000)
    near, between, far = (
        again.linear(four, size, 0, 1, decode=True, model=m) for m in (1e5, 2e6, 1e7)
    )
    assert near == pytest.approx(1e-5 + 2.5e-6 + 1e-4)
    assert between == pytest.approx(1e-5 + 2.5e-6 + 2e-4)  # half of the way, by the logarithm
    assert far == pytest.approx(1e-5 + 2.5e-6 + 3e-4)
    middle = again.linear(four, size, 0, 4, decode=True, model=1e5)
    assert middle == pytest.approx(near + 3 / 7 * near)
    assert again.linear(four, size, 0, 16, decode=True, model=1e5) == pytest.approx(4 * near)
    work = HalfWork(1000, 10**5, 10**6, 10**6, 20)
    near, between, far = (again.half(work, decode=True, model=m) for m in (1e5, 2e6, 1e7))
    assert near == pytest.approx(1e-6 + 1e-6 + 1e-6 + 2e-6 + 1e-5)
    assert between == pytest.approx(near + (2e-5 + 2e-6) / 2)  # half of the way, by the logarithm
    assert far == pytest.approx(near + 2e-5 + 2e-6)
    prompt = HalfWork(1000, 10**5, 10**4)
    assert again.half(prompt, decode=False, model=1e7) == pytest.approx(5e-6)
    with pytest.raises(UserError, match="4:g128:asym, 16 and no 3:g128:asym; measure again"):
        again.linear(QuantSpec(3, kind="weight_only"), (1, 1), 1, 1, decode=True, model=1.0)
    device["measured"]["linears"] = speed.linears | {"decode": {"4:g128:asym": table}}
    with pytest.raises(UserError, match="measured is not what"):  # how far memory is: of 16 bits
        read(tmp_path, {"devices": [device]})


def test_sizes():
    assert parse_bytes("6GB", "") == 6e9
    assert parse_bytes(" 1.5 mb ", "") == 1.5e6
    assert parse_bytes(12, "") == 12
