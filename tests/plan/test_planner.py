"""What is planned of a model whose losses are given."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny

from qllm.checkpoint.load import load_model, module_bytes
from qllm.checkpoint.weights import Weights
from qllm.config import QuantSpec
from qllm.errors import UserError
from qllm.parallel.group import Group
from qllm.parallel.pipeline import ParallelContext
from qllm.plan.candidates import parse_candidates
from qllm.plan.devices import STAGE_PASSES, Cluster, DescribedSpeed, Device
from qllm.plan.measure import Job
from qllm.plan.modules import decided_modules
from qllm.plan.planner import ANYWHERE, Limits, Planner, allowed
from qllm.plan.sensitivity import Sensitivity
from qllm.plan.shape import Shape, Workload
from qllm.plan.silence import without_output
from qllm.plan.tables import plan_lines

# It computes slowly enough for its memory not to matter.
SLOW = Device("slow", math.inf, DescribedSpeed(1e15, 1e6, 1e6), "slow")


def planner(family: str, bits: str, **decided: bool) -> Planner:
    """Of a bundled model, in which every linear weighs alike."""
    modules = decided_modules(Weights.of_floats(tiny(family)), **{"lm_head": False, **decided})
    candidates = parse_candidates(bits, "64", "asym", QuantSpec())
    losses = np.array([4.0**-spec.bits for spec in candidates])
    count = len(modules)
    choices = np.repeat(np.arange(len(candidates))[:, None], count, axis=1)
    errors, alone = np.tile(losses, (count, 1)), np.full(count, losses[0])
    tables = errors, errors > 1, 0, alone, choices, count * losses
    found = Sensitivity(modules, candidates, *tables, {})
    return Planner(found, Shape.of(tiny(family), modules, candidates, None), Workload())


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_head_is_decided_on_whatever_will_quantize(family):
    modules = decided_modules(Weights.of_floats(tiny(family)), True)
    candidates = parse_candidates("4,8", "64", "asym", QuantSpec(algorithm="gptq"))
    shape = Shape.of(tiny(family), modules, candidates, None)
    assert shape.modules[-1] == "lm_head"


def test_uniform_bits_say_what_the_embedding_has():
    found = planner("opt", "3,4,8", embedding=True)
    assert [found.uniform_name(i) for i in range(3)] == ["3, embedding 8", "4, embedding 8", "8"]
    assert found.usual_divergence("loss")[0] == "4, embedding 8"
    assert planner("opt", "3,4,8").uniform_name(0) == "3"


def test_a_front_has_each_plan_once():
    """Where bytes leave no more than half of the bits, more bits make no other plan."""
    found = planner("opt", "4,8")
    few, *_, most = found.front(Limits(), 5)
    sizes = few.nbytes, most.nbytes
    held = replace(found, max_bytes=sum(sizes) / 2)
    choices = [plan.solution.choice.tolist() for plan in held.front(Limits(), 9)]
    assert 2 <= len(choices) == len({tuple(choice) for choice in choices}) < 9
    assert len(found.front(Limits(), 9)) == 9


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_what_is_not_decided_on_is_not_held(name):
    found = planner("opt", "4,8").sensitivity
    with pytest.raises(UserError, match=f"{name} is not decided on by itself"):
        allowed(found.modules, found.candidates, {name: "8"})


def test_the_solver_prints_nothing(capfd):
    with without_output():
        os.write(1, b"from C")
    planner("opt", "4,8").decide(Limits(max_bits=6.0))
    print("from Python")
    assert capfd.readouterr().out == "from Python\n"


def test_tables_from_before_embeddings_were_decided_on_are_read():
    job = Job(tiny("opt"), parse_candidates("4,8", "64", "asym", QuantSpec()), [[1]], [[1]])
    assert "embedding" not in job.about()
    assert replace(job, embedding=True).about() != job.about()


@pytest.mark.parametrize(("memory", "said"), [(12e6, "3.00 MB of 12.00 MB"), (2e9, "0.00 GB of")])
def test_devices_are_said_in_a_unit_that_shows_them(memory, said):
    device = replace(ANYWHERE, memory=memory, speed=DescribedSpeed(1e10, 1e11, 1e11))
    found = replace(planner("opt", "4,8"), cluster=Cluster((device,)))
    plan = found.decide(Limits(max_bits=6.0))
    costs = replace(plan.solution.costs, held=np.array([3e6]))
    lines = plan_lines("opt", replace(plan, solution=replace(plan.solution, costs=costs)))
    assert any(f"layers 0 to 6, {said}" in line for line in lines)


def test_sequences_that_stages_cannot_share_evenly_are_computed_once():
    """Four in three runs through three stages: as many products as of four, and not of six."""
    base = planner("opt", "4,8")
    devices = tuple(replace(SLOW, name=str(i)) for i in range(3))
    seconds = []
    for batch, count in ((4, 3), (4, 1)):
        work = Workload(prompt=128, new=8, batch=batch)
        found = replace(base, work=work, cluster=Cluster(devices[:count]))
        problem = found.problem(Limits(), devices[:count])
        seconds.append(problem.prompt_batches * problem.prefill[0].sum())
    assert seconds[0] == pytest.approx(seconds[1])


def test_the_head_behind_prompts_is_a_step_s():
    seen = set()

    class Recording(DescribedSpeed):
        def linear(self, spec, size, nbytes, rows, *, decode, model):
            seen.add((size, rows, decode))
            return super().linear(spec, size, nbytes, rows, decode=decode, model=model)

    device = replace(SLOW, speed=Recording(1e10, 1e11, 1e11))
    found = replace(planner("opt", "4,8"), cluster=Cluster((device,)))
    replace(found, work=Workload(prompt=16, new=8, batch=2)).problem(Limits(), (device,))
    asked = {(size == found.shape.head[0], rows, decode) for size, rows, decode in seen}
    # Of the last layer, too, a prompt's last token is all that some linears see.
    assert asked == {(True, 2, True), (False, 2, True), (False, 2, False), (False, 32, False)}


def test_stages_wait_for_what_others_read_and_not_for_what_they_compute():
    """Of two sequences in two stages each computes with one row; of eight, with four."""

    class Computing(DescribedSpeed):
        def linear(self, spec, size, nbytes, rows, *, decode, model):
            return 1.0 + 0.5 * (rows - 1)

    device = replace(SLOW, speed=Computing(1e10, 1e11, 1e11), contention=0.5)
    shared = replace(device, host="here", threads=1, processors=2)
    devices = shared, replace(shared, name="other")
    base = replace(planner("opt", "4,8"), cluster=Cluster(devices))
    for batch, contention in ((2, 0.5), (8, 0.5 / 2.5)):
        found = replace(base, work=Workload(batch=batch)).problem(Limits(), devices)
        assert found.contention.tolist() == pytest.approx([contention] * 2)


def test_a_stage_takes_what_caches_keep_too_little_for():
    class Half(DescribedSpeed):
        def farness(self, model):
            return 0.5

    seconds = dict(zip(STAGE_PASSES, (1.0, 2.0, 3.0, 4.0, 10.0), strict=True))
    device = replace(SLOW, speed=Half(1e10, 1e11, 1e11), stage_passes=seconds, crowding=seconds)
    found = replace(planner("opt", "4,8"), cluster=Cluster((device,)))
    problem = found.problem(Limits(), (device,))
    for table in (problem.stage_passes, problem.crowding):
        assert table[..., 0].tolist() == [[1, 2], [3 + 5, 4]]


@pytest.mark.parametrize("embedding", [False, True])
def test_ranks_hold_the_bytes_that_are_planned(embedding):
    """OPT's LM head is its embedding: of several stages the first and the last hold it."""
    found = planner("opt", "4,8", embedding=embedding)
    shape, devices = found.shape, [replace(SLOW, name=str(i), memory=3.2e6) for i in range(3)]
    work = Workload(prompt=8, new=8)
    plan = replace(found, work=work, cluster=Cluster(tuple(devices))).decide(Limits(max_bits=6.0))
    assert len(plan.cuts) == 2
    beside = shape.cache(work)
    bounds = [0, *plan.cuts, len(beside)]
    held = [
        planned - beside[begin:end].sum() - shape.buffers(work)
        for planned, begin, end in zip(plan.solution.costs.held, bounds, bounds[1:], strict=False)
    ]
    ranks = [
        module_bytes(
            load_model(
                tiny("opt"),
                plan.quant_plan,
                parallel=ParallelContext(pp=Group((0, 1, 2), rank), cuts=plan.cuts),
            )
        )
        for rank in range(3)
    ]
    assert held == ranks
    assert plan.nbytes == sum(ranks)
