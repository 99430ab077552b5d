"""Losses of linears: what is measured, against running such plans, and the table that keeps it."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracle import draw_prompts
from quantizing import VOCAB

from qllm.checkpoint.load import load_model
from qllm.checkpoint.reader import read_raw_config
from qllm.config import EMBEDDING, QuantPlan, QuantSpec
from qllm.errors import UserError, WritingError
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.models import read_config
from qllm.plan import resume
from qllm.plan.cached import load_or_measure
from qllm.plan.candidates import labels, parse_candidates
from qllm.plan.measure import Job, measure
from qllm.plan.sensitivity import Sensitivity, draw_choices, fit, write
from qllm.progress import unseen


def windows(count: int, length: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4000, (count, length), generator=draw).tolist()


@pytest.fixture(scope="module", params=[("opt", False), ("bloom", True), ("llama", True)], ids=str)
def measured(request, shallow_of):
    """Rounding to nearest, whose weights do not depend on the inputs."""
    family, embedding = request.param
    candidates = parse_candidates("4,2,16", "64", "asym", QuantSpec())
    texts = windows(2, 32, 0), windows(2, 32, 1)
    job = Job(shallow_of(family), candidates, *texts, embedding=embedding, plans=3)
    return job, measure(job)


def outputs_of(job: Job) -> ReferenceOutputs:
    """Of the float model, through loading and generation's code."""
    reference = load_model(job.source, QuantPlan.uniform(QuantSpec()), dtype=torch.float32)
    return ReferenceOutputs.of(DecoderReference(reference), job.judged)


def divergence(job: Job, outputs: ReferenceOutputs, specs: dict[str, QuantSpec]) -> float:
    """Of the model that a plan makes, from the float one."""
    rules = tuple(
        (f"^{name.replace('.', chr(92) + '.')}$", spec)
        for name, spec in specs.items()
        if spec.kind != "dense"
    )
    model = load_model(job.source, QuantPlan(rules), dtype=torch.float32)
    return agreement(model, outputs)["kl"]["mean"]


def test_divergences_are_those_of_the_models(measured):
    job, found = measured
    names, candidates = found.modules, found.candidates
    assert [spec.bits for spec in candidates] == [2, 4, 16]
    assert (names[0] == EMBEDDING) == job.embedding
    outputs = outputs_of(job)
    for index in (0, 1, len(names) - 1):  # the embedding or a linear by itself
        only = {names[index]: candidates[found.probe]}
        assert found.alone[index] == pytest.approx(divergence(job, outputs, only), rel=0.02)
    mixed = {name: candidates[c] for name, c in zip(names, found.choices[0], strict=True)}
    assert found.divergences[0] == pytest.approx(divergence(job, outputs, mixed), rel=0.02)


def test_divergences_are_of_logits_as_the_model_divides_them(sources):
    texts = draw_prompts([24, 24], VOCAB), draw_prompts([24, 24], VOCAB, seed=1)
    job = Job(sources("granite"), parse_candidates("3,8", "16", "asym", QuantSpec()), *texts)
    found = measure(replace(job, plans=1))
    only = {found.modules[0]: found.candidates[found.probe]}
    assert found.alone[0] == pytest.approx(divergence(job, outputs_of(job), only), rel=0.02)


def test_fewer_bits_err_more(measured):
    _, found = measured
    assert (found.errors[:, 0] > found.errors[:, 1]).all()
    assert (found.errors[:, 2] == 0).all()
    assert found.sums[:, found.probe] == pytest.approx(found.alone)


def test_a_table_is_read_as_it_was_written(measured, tmp_path):
    _, found = measured
    path = tmp_path / "table.json"
    write(path, found)
    again = Sensitivity.from_file(path)
    assert again.modules == found.modules
    assert [s.bits for s in again.candidates] == [s.bits for s in found.candidates]
    for name in ("errors", "float32_scales", "alone", "choices", "divergences"):
        assert np.array_equal(getattr(again, name), getattr(found, name)), name
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in value.items() if k != "float32_scales"}))
    assert not Sensitivity.from_file(path).float32_scales.any()  # of one from before they were kept
    nothing = {key: np.zeros_like(getattr(found, key)).tolist() for key in ("alone", "divergences")}
    wrongs = {"alone": [1.0], "errors": [[-1.0]], "float32_scales": [True], "probe": 9}
    wrongs |= {"choices": [[99]], **nothing}
    for key, wrong in wrongs.items():
        path.write_text(json.dumps(value | {key: wrong}))
        with pytest.raises(UserError, match="is no table of losses"):
            Sensitivity.from_file(path)


@contextmanager
def stopped(total: int, done: int):
    """A meter of a run that Ctrl-C ends behind its next layer."""

    def add(count: int) -> None:
        raise KeyboardInterrupt

    yield add


def test_an_interrupted_run_goes_on(measured, tmp_path, monkeypatch):
    """Layer by layer, and to the same table as one that nothing interrupts."""
    job, expected = measured
    monkeypatch.setattr(resume, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(resume, "LEAST_TIMES", 0)
    table, lines = tmp_path / "table.json", []
    layers = read_config(read_raw_config(job.source)).num_layers
    for _ in range(layers):
        with pytest.raises(KeyboardInterrupt):
            load_or_measure(job, table, stopped, lines.append, lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json.partial"]
    with pytest.raises(UserError, match=r"json\.partial holds an interrupted run on another"):
        load_or_measure(replace(job, seed=1), table, stopped, lines.append, lines.append)
    partial = tmp_path / "table.json.partial"
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"json\.partial is not a whole .*, or remove it to begin"):
        load_or_measure(job, table, unseen, lines.append, lines.append)
    partial.write_bytes(whole)
    found = load_or_measure(job, table, unseen, lines.append, lines.append)
    for name in ("errors", "float32_scales", "alone", "choices", "divergences"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    going_on = [line for line in lines if line.startswith("going on")]
    assert going_on == [
        f"going on: {done} of {layers} layers are measured already" for done in range(1, layers + 1)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_full_disk_takes_the_way_back_alone(measured, tmp_path, monkeypatch):
    job, expected = measured
    monkeypatch.setattr(resume, "LEAST_SECONDS", 0.0)
    lines = []

    def full(path):
        raise WritingError("the disk is full")

    monkeypatch.setattr(resume, "new_file", full)
    keeper = resume.PartialTable(tmp_path / "table.json", job.about(), lines.append)
    assert np.array_equal(measure(job, partial=keeper).errors, expected.errors)
    assert lines == ["if this is interrupted it begins again: the disk is full"]


def test_a_power_of_the_sum_is_found_again():
    sums = np.array([1e-5, 1e-4, 1e-3, 1e-2])
    found = fit(sums, 1.2 * sums**1.03)
    assert (found.factor, found.power) == pytest.approx((1.2, 1.03))
    assert found.error < 1e-9
    assert found.total(found.divergence(0.003)) == pytest.approx(0.003)
    assert found.divergence(0.0) == 0.0


@pytest.mark.parametrize("divergences", [[1e-12] * 4, [4e-12, 3e-12, 2e-12, 1e-12]])
def test_a_divergence_that_does_not_grow_is_about_the_sum(divergences):
    found = fit(np.array([1e-5, 1e-4, 1e-3, 1e-2]), np.array(divergences))
    assert found.power == 1
    assert found.divergence(found.total(0.001)) == pytest.approx(0.001)
    assert found.total(1e300) < math.inf


def test_a_linear_without_an_error_adds_nothing():
    specs = parse_candidates("3,4", "128", "asym", QuantSpec())
    errors, alone = np.array([[0.0, 0.0], [0.4, 0.1]]), np.array([1e-12, 0.02])
    tables = errors, errors > 1, 0, alone, np.array([[0, 0]]), alone[1:]
    table = Sensitivity(("a", "b"), specs, *tables, {})
    assert table.sums == pytest.approx(np.array([[0.0, 0.0], [0.02, 0.005]]))


def test_mixed_plans_stay_near_a_candidate():
    candidates = parse_candidates("2,3,4,8", "128", "asym", QuantSpec())
    choices = draw_choices(40, candidates, 8, seed=0)
    assert choices.shape == (8, 40)
    assert all(row.max() - row.min() <= 2 for row in choices)
    assert len({tuple(row) for row in choices}) == 8


def test_nothing_to_choose_is_refused():
    with pytest.raises(UserError, match="leaves nothing to choose"):
        parse_candidates("4,4", "64", "sym", QuantSpec())
    with pytest.raises(UserError, match="bitwidth '9' is unknown"):
        parse_candidates("4,9", "64", "sym", QuantSpec())
    with pytest.raises(UserError, match="`group_size` 'all' is no whole number"):
        parse_candidates("4,3", "64,all", "sym", QuantSpec())


def test_groups_and_schemes_are_candidates_beside_each_other():
    specs = parse_candidates("16,3,2,8:tc-li", "64,-1", "asym", QuantSpec(algorithm="gptq"))
    assert labels(specs) == ["2:g-1", "2:g64", "3:g-1", "3:g64", "8:tc-li", "16"]
    assert {s.algorithm for s in specs if s.kind == "weight_only"} == {"gptq"}
    assert labels(parse_candidates("4", "64", "sym,asym", QuantSpec())) == ["4:asym", "4:sym"]


def test_int8_activations_count(shallow_of):
    candidates = parse_candidates("8,8:tc-li", "-1", "sym", QuantSpec())
    job = Job(shallow_of("llama"), candidates, windows(2, 32, 0), windows(2, 32, 1), plans=1)
    int8, eight = measure(job).errors.T
    # Weights are rounded alike, and the inputs of the first besides.
    assert (int8 > eight).all()
