"""What stages take besides their part of a model is told from what they take together."""

from __future__ import annotations

import pytest

from qllm.plan.network import _beside


@pytest.mark.parametrize(
    ("stages", "share", "busy"),
    [(2, 0.25, 12 + 2 * 5), (2, 0.5, 12 + 2 * 5), (2, 1.0, 2 * 22), (3, 0.5, 1.5 * 27)],
)
def test_what_a_stage_takes_besides_does_not_count_what_others_have_its_processors_for(
    stages, share, busy
):
    """By hand: stages of a model of 12 s, each of which takes 5 s more while all work."""
    hops = stages - 1
    measured = {
        "alone": [100.0, 12.0],
        "one": [100.0 + stages * 7 + hops * 0.5, 12.0 + stages * 3 + 2 * hops * 0.5],
        "all": [1e3, float(busy)],
    }
    found = _beside(measured, stages, 0.5, share)
    assert found == pytest.approx({"prefill": 7.0, "decode": 3.0, "busy_decode": 5.0})
