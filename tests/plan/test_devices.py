"""What products and the rest of a layer take on a device that was measured."""

from __future__ import annotations

import json

import pytest

from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.plan.cluster_file import read_cluster
from qllm.plan.devices import STAGE_PASSES, HalfWork, MeasuredSpeed


def test_measured_speeds_are_what_was_measured(tmp_path):
    same = 1e-10, 1e-10, 3e-10, 3e-10
    table = {"1": (1e-5, 1e-9, *same), "8": (2e-5, 2e-9, *(2 * each for each in same))}
    speed = MeasuredSpeed(
        {"decode": {"4:g128:asym": table, "16": table}, "prefill": {"4:g128:asym": table}},
        {"decode": (1e-6, 4e-6, 1e-9, 1e-11, 2e-12), "prefill": (2e-6, 0.0, 0.0, 0.0, 3e-10)},
        (1e-11, 2e-11, 1e-7),
        {"decode": (5e-6, 2e-6, 1e-9), "prefill": (1e-3, 0.0, 0.0)},
        (5e5, 1e6, 4e6, 8e6),
        {"decode": 0.5, "prefill": 0.125},
    )
    beside = {"stage_passes": {"decode": 2e-5}, "crowding": {"prefill": 1e-4}, "processors": 2}
    beside |= {"contention": 0.25}
    device: dict = {"name": "here", "memory": 1e9, "measured": speed.to_json(), **beside}
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({"devices": [device]}))
    (found,) = read_cluster(path).devices
    again = found.speed
    assert again == speed and found.processors == 2
    nothing = dict.fromkeys(STAGE_PASSES, 0.0)
    assert found.stage_passes == nothing | {"decode": 2e-5}
    assert found.crowding == nothing | {"prefill": 1e-4} and found.contention == 0.25
    assert [again.step(4, decode=decode) for decode in (True, False)] == [5e-6 + 4 * 2e-6, 1e-3]
    assert again.logits(4 * 1000, decode=True) == pytest.approx(4e-6)
    four, size = QuantSpec(4, kind="weight_only"), (500, 2000)
    near, between, far = (
        again.linear(four, size, 0, 1, decode=True, model=m) for m in (1e5, 2e6, 1e7)
    )
    assert near == pytest.approx(1e-5 + 2.5e-6 + 1e-4)
    # Half of the way, by the logarithm; and products of a model take by a half longer than alone.
    assert between == pytest.approx(1.25 * (1e-5 + 2.5e-6 + 2e-4))
    assert far == pytest.approx(1.5 * (1e-5 + 2.5e-6 + 3e-4))
    prompt = again.linear(four, size, 0, 1, decode=False, model=1e5)
    assert prompt == pytest.approx(1.125 * near)  # wherever its weights come from
    middle = again.linear(four, size, 0, 4, decode=True, model=1e5)
    assert middle == pytest.approx(near + 3 / 7 * near)
    assert again.linear(four, size, 0, 16, decode=True, model=1e5) == pytest.approx(4 * near)
    work = HalfWork(1000, 10**5, 10**6, 10**6, 20)
    near, between, far = (again.half(work, decode=True, model=m) for m in (1e5, 2e6, 1e7))
    assert near == pytest.approx(1e-6 + 1e-6 + 1e-6 + 2e-6 + 1e-5)
    assert between == pytest.approx(near + (4e-6 + 2e-5 + 2e-6) / 2)  # half of the way again
    assert far == pytest.approx(near + 4e-6 + 2e-5 + 2e-6)
    prompt = HalfWork(1000, 10**5, 10**4)
    assert again.half(prompt, decode=False, model=1e7) == pytest.approx(5e-6)
    with pytest.raises(UserError, match="4:g128:asym, 16 and no 3:g128:asym; measure again"):
        again.linear(QuantSpec(3, kind="weight_only"), (1, 1), 1, 1, decode=True, model=1.0)
    device["measured"]["linears"] = speed.linears | {"decode": {"4:g128:asym": table}}
    path.write_text(json.dumps({"devices": [device]}))
    with pytest.raises(UserError, match="measured is not what"):  # how far memory is: of 16 bits
        read_cluster(path)
