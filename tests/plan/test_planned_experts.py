"""Plans of mixtures of experts: what is decided on, what it loses, and what it takes."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from oracle import load, random_model
from random_configs import CONFIGS, MIXTURES
from transformers import PretrainedConfig
from upcycling import upcycled

from qllm.checkpoint.load import load_model, module_bytes
from qllm.checkpoint.weights import Weights
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.evaluate.agreement import DecoderReference, ReferenceOutputs, agreement
from qllm.models import RawConfig
from qllm.models import read_config as model_config
from qllm.plan import output_errors, probed_experts, resume
from qllm.plan.candidates import parse_candidates
from qllm.plan.cluster_file import read_cluster
from qllm.plan.devices import PHASES, Cluster, DescribedSpeed, Device, MeasuredSpeed
from qllm.plan.measure import Job, measure
from qllm.plan.modules import decided_modules, linears_of, pattern_of
from qllm.plan.planner import Limits, Planner, allowed
from qllm.plan.possible import MEMORY, Asked
from qllm.plan.probed_experts import ProbedExperts
from qllm.plan.resume import PartialTable
from qllm.plan.sensitivity import Sensitivity
from qllm.plan.shape import Shape, Workload
from qllm.plan.tables import plan_lines
from qllm.plan.verify import verify

UP, DOWN = "layers.0.mlp.experts.*.up", "layers.0.mlp.experts.*.down"
CANDIDATES = parse_candidates("2,3,4,16", "64", "asym", QuantSpec())


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Of two layers, of which the first has experts and a shared one."""
    return upcycled("qwen2_moe", tmp_path_factory.mktemp("qwen") / "model", dense=[1])


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return upcycled("mixtral", tmp_path_factory.mktemp("mixtral") / "model", layers=1)


def has_several_experts(config: PretrainedConfig) -> bool:
    """In one of its layers at the least, and several layers."""
    read = model_config(RawConfig(config.to_dict(), "config.json"))
    several = read.experts is not None and read.experts.count > 1
    return several and config.num_hidden_layers > 1


@pytest.fixture(scope="module", params=MIXTURES)
def random(request, tmp_path_factory):
    """Of sizes that are drawn, of each family."""
    folder, drawn = tmp_path_factory.mktemp(request.param), []

    @settings(max_examples=1, database=None, derandomize=True, phases=[Phase.generate])
    @given(CONFIGS[request.param][0].filter(has_several_experts))
    def draw(config):
        drawn.append(config)

    draw()
    random_model(drawn[0]).save_pretrained(folder)
    return folder


def windows(count: int, length: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4000, (count, length), generator=draw).tolist()


def job_of(folder, **changes) -> Job:
    """Of rounding to nearest, on so few tokens that some experts have none."""
    return Job(folder, CANDIDATES, windows(1, 3, 0), windows(1, 24, 1), plans=2, **changes)


@pytest.fixture(scope="module")
def measured(qwen):
    lines = []
    return measure(job_of(qwen), note=lines.append), lines


def planner(folder, candidates=CANDIDATES) -> Planner:
    """Where every linear weighs alike."""
    modules = decided_modules(Weights.of_floats(folder), lm_head=False)
    losses = np.array([4.0 ** -min(spec.bits, 8) for spec in candidates])
    count = len(modules)
    choices = np.repeat(np.arange(len(candidates))[:, None], count, axis=1)
    errors, alone = np.tile(losses, (count, 1)), np.full(count, losses[0])
    tables = errors, np.zeros(errors.shape, int), 0, alone, choices, count * losses
    found = Sensitivity(modules, candidates, *tables, {})
    return Planner(found, Shape.of(folder, modules, candidates, None), Workload())


def test_names_stand_for_the_linears_that_their_expressions_are_found_in(random):
    weights = Weights.of_floats(random)
    linears = weights.family.layer_linears(weights.config)
    names, found = decided_modules(weights, lm_head=False), []
    for name in names:
        matched = [linear for linear in linears if re.search(pattern_of(name), linear)]
        assert sorted(matched) == sorted(linears_of(name, weights.config))
        found += matched
    assert sorted(found) == sorted(linears) and len(names) < len(linears)


def test_bytes_are_those_that_loading_has(random):
    """Of a drawn choice: experts, routers, shared ones, and what is around them."""
    found = planner(random)
    draw = np.random.default_rng(0)
    choice = draw.integers(0, len(CANDIDATES), len(found.shape.modules))
    base = found.uniform(0, Limits())
    costs = base.problem.evaluate(choice, base.solution.device)
    plan = replace(base, solution=replace(base.solution, choice=choice, costs=costs))
    assert plan.nbytes == module_bytes(load_model(random, plan.quant_plan))


def test_the_fewest_bytes_are_those_of_all_experts(qwen):
    shape = planner(qwen).shape
    asked = Asked(shape, False, Workload(), CANDIDATES, None, False, [1e9], MEMORY)
    ones = QuantPlan(((r"layers\.", QuantSpec(1, -1, kind="weight_only")),))
    of_one_bit = asked._of_one_bit().sum() + shape.fixed.sum()
    assert of_one_bit == pytest.approx(module_bytes(load_model(qwen, ones)), rel=0.01)


def test_layers_without_experts_are_decided_on_as_others(qwen):
    names = decided_modules(Weights.of_floats(qwen), lm_head=True)
    assert names == (
        *("layers.0.attention.qkv", "layers.0.attention.out", UP, "layers.0.mlp.shared.up", DOWN),
        *("layers.0.mlp.shared.down", "layers.1.attention.qkv", "layers.1.attention.out"),
        *("layers.1.mlp.up", "layers.1.mlp.down", "lm_head"),
    )
    lines = plan_lines("qwen", planner(qwen).uniform(1, Limits()))
    header, _, first, second, *_ = (re.split(r" *\| *", line) for line in lines)
    assert {"mlp.up", "mlp.down", "mlp.experts.*.up", "mlp.shared.down"} <= set(header)
    assert len(header) == len(first) == len(second)
    assert first[header.index("mlp.up")] == second[header.index("mlp.experts.*.up")] == ""
    assert first[header.index("mlp.shared.up")] == second[header.index("mlp.up")] == "3"


def test_errors_are_summed_over_the_tokens_that_reach_each_expert(qwen, measured):
    """In float64, of what each expert took in the float model."""
    table, lines = measured
    model, seen = load(qwen), defaultdict(list)
    weights = Weights.of_floats(qwen)
    names = [n for each in (UP, DOWN, "layers.1.mlp.up") for n in linears_of(each, weights.config)]
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].double()))
    model.prefill(windows(1, 3, 0), last=False)
    lost = [name.removeprefix("layers.0.") for name in names if name not in seen]
    assert lost and lines == [
        f"layers.0: no token of the text reaches {len(lost)} of 12 linears, such as {lost[0]}: "
        "what they lose counts for nothing"
    ]
    for candidate, bits in enumerate(("2", "3", "4")):
        quantized = load(qwen, plan=QuantPlan.uniform(CANDIDATES[candidate]))
        for module in (UP, DOWN, "layers.1.mlp.up"):
            error = whole = 0.0
            for name in linears_of(module, weights.config):
                for x in seen[name]:
                    weight = model.get_submodule(name).weight.double()
                    wrong = quantized.get_submodule(name).dequantize().double() - weight
                    error += (x @ wrong.t()).square().sum().item()
                    whole += (x @ weight.t()).square().sum().item()
            row = table.modules.index(module)
            assert table.errors[row, candidate] == pytest.approx(error / whole, rel=1e-3), bits


def test_divergences_are_those_of_the_models(qwen, measured):
    table, _ = measured
    job = job_of(qwen)
    outputs = ReferenceOutputs.of(DecoderReference(load(qwen)), job.judged)

    def divergence(specs: dict[str, QuantSpec]) -> float:
        rules = tuple((pattern_of(n), s) for n, s in specs.items() if s.kind != "dense")
        return agreement(load(qwen, plan=QuantPlan(rules)), outputs)["kl"]["mean"]

    for name in (UP, DOWN, "layers.0.mlp.shared.up"):
        found = table.alone[table.modules.index(name)]
        assert found == pytest.approx(divergence({name: CANDIDATES[table.probe]}), rel=0.02)
    mixed = {n: CANDIDATES[c] for n, c in zip(table.modules, table.choices[0], strict=True)}
    assert table.divergences[0] == pytest.approx(divergence(mixed), rel=0.02)


def test_how_many_are_observed_at_once_changes_nothing(qwen, measured, monkeypatch):
    inputs = 4 * 256**2
    for limit in (1, 3 * inputs):  # by themselves, and first and second matrices of some experts
        monkeypatch.setattr(output_errors, "OBSERVED_BYTES", limit)
        again = measure(job_of(qwen))
        assert again.errors == pytest.approx(measured[0].errors, rel=1e-6)
        assert again.alone == pytest.approx(measured[0].alone, rel=1e-4)


def test_an_interrupted_run_goes_on(qwen, measured, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(resume, "LEAST_TIMES", 0)
    job, lines = job_of(qwen), []

    @contextmanager
    def stopped(total: int, done: int):
        def add(count: int) -> None:
            raise KeyboardInterrupt

        yield add

    partial = PartialTable(tmp_path / "table.json", job.about(), lines.append)
    with pytest.raises(KeyboardInterrupt):
        measure(job, stopped, partial=partial)
    found = measure(job, note=lines.append, partial=partial)
    assert "going on: 1 of 2 layers are measured already" in lines
    for name in ("errors", "float32_scales", "alone", "divergences"):
        assert np.array_equal(getattr(found, name), getattr(measured[0], name)), name


def test_int8_activations_of_experts_count(mixtral):
    candidates = parse_candidates("8,8:tc-li", "-1", "sym", QuantSpec())
    texts = windows(1, 24, 0), windows(1, 24, 1)
    int8, eight = measure(Job(mixtral, candidates, *texts, plans=1)).errors.T
    assert (int8 > eight).all()


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_step_reads_the_experts_that_are_expected(mixtral, tokens):
    """Over all that so many tokens may choose."""
    shape = planner(mixtral).shape
    pairs = [set(pair) for pair in itertools.combinations(range(4), 2)]
    chosen = itertools.product(pairs, repeat=tokens)
    expected = float(np.mean([len(set.union(*each)) for each in chosen]))
    read, rows = shape.products(shape.modules.index(UP), tokens)
    assert (read, read * rows) == pytest.approx((expected, 2 * tokens))
    assert shape.products(shape.modules.index("layers.0.attention.qkv"), tokens) == (1, tokens)


def test_times_are_of_the_experts_that_run_and_of_what_chooses_them(qwen):
    """A product takes a second here, and its rows in thousands more."""
    seen = []

    class Counting(DescribedSpeed):
        def linear(self, spec, size, nbytes, rows, *, decode, model):
            seen.append((size, nbytes, model))
            return 1 + rows / 1000

        def half(self, work, *, decode, model):
            return 0.0

        def experts(self, read, values, *, decode):
            return 10 * read + values / 256e4

        def logits(self, count, *, decode):
            return 0.0

    device = Device("one", 1e12, Counting(1.0, 1.0, 1.0), "one")
    found = replace(planner(qwen), cluster=Cluster((device,)), work=Workload(64, 8, 3))
    problem, shape = found.problem(Limits("latency"), (device,)), found.shape
    row = shape.modules.index(UP)
    read = 4 * (1 - 0.5**3)
    assert problem.decode[0, row, 0] == pytest.approx(read + 3 * 2 / 1000)
    # So many tokens go through all of them, each through two.
    assert problem.prefill[0, row, 0] == pytest.approx(4 + 3 * 64 * 2 / 1000)
    shared = shape.modules.index("layers.0.mlp.shared.up")
    assert problem.decode[0, shared, 0] == pytest.approx(1 + 3 / 1000)
    # The router, the gate of the shared one, and calls of both; the head is in the last half.
    calls = 10 * (read + 1) + 3 * 3 / 1e4
    assert problem.fixed_decode[0, 1] == pytest.approx(2 * (1 + 3 / 1000) + calls)
    calls = 10 * (4 + 1) + 3 * 3 * 64 / 1e4
    assert problem.fixed_prefill[0].tolist() == pytest.approx([0, 2.384 + calls, 0, 1.003])
    sizes = {(size, nbytes) for size, nbytes, _ in seen}
    assert ((256, 192), shape.nbytes[row, 0] / 4) in sizes and ((256, 4), 2 * 256 * 4) in sizes
    # What a step goes through, by which caches keep it or do not.
    step = np.median(shape.nbytes, axis=1)
    step[[row, shape.modules.index(DOWN)]] *= read / 4
    (held,) = {model for *_, model in seen}
    assert held == step.sum() + shape.cache(found.work).sum() + shape.head[1] + 2 * 256 * 5


def test_what_experts_of_prompts_take_besides_products_is_told_from_two_prompts(tmp_path):
    """By hand: a millisecond each, and a nanosecond for each value that they take."""
    probed = ProbedExperts(torch.float32, "cpu")
    assert probed.seconds() == (0.0, 0.0)
    for (tokens, whole), run in probed.calls():
        run()
        values = tokens * probed_experts.TOP_K * probed_experts.CHANNELS
        beside = 1e-3 * probed_experts.EXPERTS + 1e-9 * values
        probed.times[tokens, whole] = [tokens / 1e3 + whole * beside]
    assert probed.seconds() == pytest.approx((1e-3, 1e-9))
    table = {phase: {"16": {"1": (0.0,) * 6}} for phase in PHASES}
    beside = dict.fromkeys(PHASES, (0.0,) * 5), (0.0,) * 3, dict.fromkeys(PHASES, (0.0,) * 3)
    rest = (1.0, 2.0, 3.0, 4.0), dict.fromkeys(PHASES, 0.0), probed.seconds()
    speed = MeasuredSpeed(table, *beside, *rest)
    path = tmp_path / "cluster.json"
    devices = [{"name": "here", "memory": 1, "measured": speed.to_json()}]
    path.write_text(json.dumps({"devices": devices}))
    (device,) = read_cluster(path).devices
    assert device.speed.experts(6, 1e6, decode=False) == pytest.approx(7e-3)
    assert device.speed.experts(6, 1e6, decode=True) == 0
    del devices[0]["measured"]["of_experts"]  # as probes had it before experts were known
    path.write_text(json.dumps({"devices": devices}))
    assert read_cluster(path).devices[0].speed.experts(6, 1e6, decode=False) == 0
    described = DescribedSpeed(1e9, 1.0, 1.0, overhead=1e-3)
    assert described.experts(2, 1e6, decode=True) == pytest.approx(2e-3 + 1e-2)


@pytest.mark.parametrize("objective", ["loss", "latency", "throughput"])
def test_a_plan_is_the_best_of_all(mixtral, objective):
    """Of three candidates for the linears of a layer, on one device and on two."""
    found = replace(planner(mixtral, CANDIDATES[:3]), work=Workload(16, 8, 2))
    shape, loss = found.shape, found.uniform(1, Limits()).divergence
    limits = Limits("loss", None, 3.2) if objective == "loss" else Limits(objective, 2.5 * loss)
    total = shape.nbytes[:, 1].sum() + shape.fixed.sum() + shape.cache(found.work).sum()
    for count, share in ((1, 1.0), (2, 0.6)):
        speed = DescribedSpeed(1e9, 1e10, 1e10)
        memory = share * total + shape.buffers(found.work)
        devices = tuple(Device(str(i), memory, speed, "same") for i in range(count))
        given = replace(found, cluster=Cluster(devices))
        plan, problem = given.decide(limits), given.problem(limits, devices)
        values = [
            problem.value(costs)
            for cut in range(problem.halves + 1 if count == 2 else 1)
            for choice in itertools.product(range(3), repeat=len(found.shape.modules))
            if problem.keeps_to_limits(
                costs := problem.evaluate(
                    np.array(choice), (np.arange(problem.halves) >= cut).astype(int) * (count - 1)
                )
            )
        ]
        assert plan.solution.value == pytest.approx(min(values), rel=2e-4)


def test_a_plan_leaves_less_than_uniform_bits_of_its_bytes(qwen):
    texts = windows(6, 32, 0), windows(4, 32, 1)
    specs = parse_candidates("2,3,4", "64", "asym", QuantSpec(algorithm="gptq"))
    table = measure(Job(qwen, specs, *texts))
    scales = table.float32_scales
    shape = Shape.of(qwen, table.modules, specs, None, float32_scales=scales)
    found = Planner(table, shape, Workload())
    uniform = found.uniform(1, Limits())
    plan = found.decide(Limits(max_bits=uniform.solution.costs.bits))
    assert plan.nbytes <= uniform.nbytes
    verified, of_uniform = (
        verify(qwen, each, "gptq", *texts, None, "cpu").measured for each in (plan, uniform)
    )
    assert verified["bytes"] == plan.nbytes
    assert verified["divergence"] < 0.9 * of_uniform["divergence"]
    assert 1 / 2 < verified["divergence"] / plan.divergence < 2


def test_all_experts_of_a_layer_are_held_or_none(qwen):
    weights = Weights.of_floats(qwen)
    modules = decided_modules(weights, lm_head=False)
    mask = allowed(modules, CANDIDATES, {r"\.experts\.": "4"}, config=weights.config)
    held = [name for name, row in zip(modules, mask, strict=True) if row.sum() == 1]
    assert held == [UP, DOWN]
    with pytest.raises(UserError, match=r"matches layers\.0\.mlp\.experts\.1\.up and not layers"):
        allowed(modules, CANDIDATES, {r"experts\.1\.": "4"}, config=weights.config)
    with pytest.raises(UserError, match="matches no linear"):
        allowed(modules, CANDIDATES, {"router": "4"}, config=weights.config)
