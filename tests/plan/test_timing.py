"""What is asked of a model that is timed fits into its window."""

from __future__ import annotations

import pytest
from conftest import tiny

from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.plan.shape import Workload
from qllm.plan.timing import time_generation


@pytest.mark.parametrize(
    ("window", "prompt", "new", "fits"),
    [
        (None, None, None, (512, 128)),
        (512, None, None, (384, 128)),
        (512, None, 12, (500, 12)),
        (512, 200, None, (200, 128)),
        (16, None, None, (8, 8)),
        (16, 12, 4, (12, 4)),
        (16, 13, 4, None),
        (16, None, 16, None),
    ],
)
def test_a_workload_fits_into_the_window(window, prompt, new, fits):
    if fits is None:
        with pytest.raises(UserError, match=f"exceed the model's window of {window}; give less"):
            Workload.within(window, prompt, new, 1)
    else:
        assert Workload.within(window, prompt, new, 1) == Workload(*fits, 1)


@pytest.mark.parametrize(("prompt", "new", "batch"), [(500, 12, 2), (511, 1, 1), (3, 1, 3)])
def test_all_that_fits_can_be_timed(prompt, new, batch):
    model = load_model(tiny("opt"), QuantPlan.parse("16"))
    assert model.config.max_positions == 512
    assert min(time_generation(model, Workload(prompt, new, batch), repeats=1)) > 0
