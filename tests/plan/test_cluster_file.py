"""Clusters: what a file may say, and what is said of one that is wrong."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.plan.cluster_file import parse_bytes, read_cluster
from qllm.plan.devices import Cluster

GOOD = {"name": "gpu", "memory": "10GB", "bandwidth": "900GB", "flops": 1e14}


def read(tmp_path, value) -> Cluster:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(value))
    return read_cluster(path)


def test_the_example_is_read():
    cluster = read_cluster(ROOT / "examples" / "cluster.json")
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
        ({"devices": [GOOD | {"measured": {}, "wakeup": 3}]}, "measure again: `describe_machine`"),
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
        read_cluster(ROOT / "no.json")


def test_sizes():
    assert parse_bytes("6GB", "") == 6e9
    assert parse_bytes(" 1.5 mb ", "") == 1.5e6
    assert parse_bytes(12, "") == 12
