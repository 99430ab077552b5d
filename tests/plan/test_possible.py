"""Limits that nothing keeps to: what an error names would do, and what it leaves out would not."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from conftest import tiny

from qllm.checkpoint.weights import Weights
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.plan.candidates import parse_candidates
from qllm.plan.cluster_file import parse_bytes
from qllm.plan.modules import decided_modules
from qllm.plan.planner import allowed, rounded_up
from qllm.plan.possible import CLUSTER, MEMORY, SIZE, Asked
from qllm.plan.shape import Shape, Workload


@cache
def read(family: str, bits: str, *, lm_head: bool = False, embedding: bool = False) -> tuple:
    """What is asked of a bundled model: its shape, whether its head is tied, and the choices."""
    weights = Weights.of_floats(tiny(family))
    modules = decided_modules(weights, lm_head=lm_head, embedding=embedding)
    candidates = parse_candidates(bits, "64", "asym", QuantSpec())
    shape = Shape.of(tiny(family), modules, candidates, None)
    return shape, weights.config.tied_head, candidates, allowed(modules, candidates, {})


def asked(family: str, memory: float, option: str, bits: str = "2,4", **decided: bool) -> Asked:
    shape, tied, candidates, mask = read(family, bits, **decided)
    given = [memory / 2] * 2 if option == CLUSTER else [memory]
    return Asked(shape, tied, Workload(64, 16, 2), candidates, mask, False, given, option)


def fits(given: Asked) -> bool:
    try:
        given.check(None)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("option", [SIZE, MEMORY, CLUSTER])
@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("memory", [1e3, 2.4e6, 3.3e6, 3.6e6])
def test_each_remedy_does_and_no_other(family, option, memory):
    given = asked(family, memory, option)
    with pytest.raises(UserError, match="are missing; what would do: ") as error:
        given.check(None)
    first, *named = str(error.value).partition("what would do: ")[2].split(", or ")
    remedies = {
        "fewer bits in `bits`": asked(family, memory, option, "1,2"),
        "a smaller `batch`, `prompt` or `new`": replace(given, work=Workload(1, 1, 1)),
        "`embedding`": asked(family, memory, option, embedding=True),
    }
    if family == "llama":
        remedies["`lm_head`"] = asked(family, memory, option, lm_head=True)
    # One bit in groups has more scales than one per channel, which may be what is needed.
    of_one_bit = remedies.pop("fewer bits in `bits`")
    assert fits(of_one_bit) <= ("fewer bits in `bits`" in named)
    assert [name for name, other in remedies.items() if fits(other)] == [
        name for name in named if name in remedies
    ]
    if option == CLUSTER:
        assert first == "more devices or memory in `cluster`"
    else:
        words = first.split()
        assert words[0] == option
        enough = parse_bytes(words[1], "")
        assert fits(replace(given, memory=[enough]))
        assert not fits(replace(given, memory=[enough - 2e4]))


def test_devices_without_a_part_need_no_buffers():
    """By hand: one of two holds it all, so that nothing is held twice, nor are there buffers."""
    given = asked("opt", 0.0, CLUSTER)
    shape = given.shape
    one = float(shape.nbytes.min(axis=1).sum() + shape.fixed.sum())
    one += float(shape.cache(given.work).sum()) + shape.buffers(given.work)
    assert fits(replace(given, memory=[1.0, one])) and not fits(replace(given, memory=[1, one - 9]))
    two = one + shape.tied + shape.buffers(given.work)
    assert fits(replace(given, memory=[two / 2] * 2))
    assert not fits(replace(given, memory=[two / 2 - 9] * 2))


@pytest.mark.parametrize("value", np.geomspace(1.23456e-9, 9.999e3, 7))
def test_what_is_enough_is_not_rounded_down(value):
    assert value <= float(rounded_up(value)) <= value * 1.01
