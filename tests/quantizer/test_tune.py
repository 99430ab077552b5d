"""Layers that are tuned as a whole: what it gains, what it leaves alone, and what is saved."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import contents, is_killed, killed_at
from oracle import assert_logits_close, draw_prompts, load, prefill_logits
from quantizing import VOCAB, samples, saved
from transformers import AutoModelForCausalLM

from qllm.config import QuantPlan, QuantSpec
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder
from qllm.quant.algorithm import DistillOptions, QuantizeOptions, TuneOptions
from qllm.quant.packing import unpack
from qllm.quant.rtn import quantize_rtn
from qllm.quantizer import checkpoint, distill, refine
from qllm.quantizer import tune as tune_module
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.distill import ScaledLinear
from qllm.quantizer.job import Job
from qllm.quantizer.layer import LinearReport
from qllm.quantizer.tune import held_out
from qllm.quantizer.workers import Workers

pytestmark = pytest.mark.usefixtures("one_thread")

SEEN = samples(64, 24)
PROMPTS = draw_prompts([7, 1, 12], VOCAB)
NONE = DistillOptions(steps=0)
TUNED = TuneOptions(steps=12, batch=4)
OPTIONS = QuantizeOptions(refine=True, tune=TUNED, distill=NONE)


def plan_of(value: object, algorithm: str = "signround", group_size: int = 16) -> QuantPlan:
    spec = QuantSpec(group_size=group_size, algorithm=algorithm)
    if isinstance(value, dict):
        return QuantPlan.from_json(value, default=spec)
    return QuantPlan.parse(str(value), spec)


def tune(
    source: Path, target: Path, plan: QuantPlan, **job
) -> tuple[list[str], list[LinearReport]]:
    """The notes of a run, and its reports."""
    notes: list[str] = []
    job = {"options": OPTIONS, "samples": samples(), **job}
    return notes, quantize_checkpoint(Job(source, plan, **job), target, note=notes.append)


def errors(notes: list[str]) -> list[tuple[float, float]]:
    """Of each layer, before and after tuning, in percent."""
    lines = [line for line in notes if " when tuned" in line]
    words = [line.replace("%", "").replace(",", "").split() for line in lines]
    return [(float(line[3]), float(line[4])) for line in words]


# tests/ops/test_differentiable.py has all families, and other tests here those that are slow.
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("opt", "gptq"),
        ("llama", "signround"),
        ("gemma2", "gptq"),
        ("gpt2", "signround"),
        pytest.param("opt-350m", "signround", marks=pytest.mark.slow),
        pytest.param("bloom", "gptq", marks=pytest.mark.slow),
    ],
)
def test_no_half_of_a_layer_is_worse_than_it_was(name, algorithm, tmp_path):
    source = saved(name, tmp_path / "source")
    notes, reports = tune(source, tmp_path / "out", plan_of(4, algorithm))
    found = errors(notes)
    assert len(found) == 4  # the halves of two layers
    better = [after < before for before, after in found for _ in range(2)]
    assert [report.of_output for report in reports] == [
        tuned or algorithm == "gptq" for tuned in better
    ]
    exact = load(source).prefill(PROMPTS, last=False)
    got = load(tmp_path / "out").prefill(PROMPTS, last=False)
    assert (got - exact).square().mean() < 0.6 * exact.var()


def test_tuning_gains_where_the_grid_is_coarse(tmp_path):
    """On samples that are held out, and of the whole model."""
    source = saved("opt", tmp_path / "source")
    options = QuantizeOptions(tune=TuneOptions(steps=40, batch=16), distill=NONE)
    job = {"options": options, "samples": samples(64, 24)}
    notes, _ = tune(source, tmp_path / "out", plan_of(2, group_size=-1), **job)
    assert all(after < 0.9 * before for before, after in errors(notes))
    quantize_checkpoint(Job(source, plan_of(2, "rtn", group_size=-1)), tmp_path / "nearest")
    exact = load(source).prefill(PROMPTS, last=False)
    found = [
        (load(tmp_path / name).prefill(PROMPTS, last=False) - exact).square().mean()
        for name in ("out", "nearest")
    ]
    assert found[0] < found[1]


def test_coordinate_descent_is_kept_where_it_gains_and_the_note_says_so(tmp_path, monkeypatch):
    source = saved("opt", tmp_path / "source")
    options = QuantizeOptions(refine=True, tune=TuneOptions(steps=20, batch=8), distill=NONE)
    files = []
    for name in ("with", "without"):
        notes, _ = tune(source, tmp_path / name, plan_of(2, "gptq"), options=options, samples=SEEN)
        said = [line for line in notes if "mlp.down by descent" in line]
        assert bool(said) == (name == "with")
        files.append(contents(tmp_path / name)["model.safetensors"])
        monkeypatch.setattr(refine, "descend_last", lambda layer, run, name, linear, *_: linear)
    assert files[0] != files[1]


def test_integers_are_those_of_rounding_to_nearest_or_beside_them(tmp_path):
    source = saved("opt", tmp_path / "source")
    options = QuantizeOptions(tune=TUNED, distill=NONE)
    tune(source, tmp_path / "out", plan_of(4), options=options)
    ours, exact = load(tmp_path / "out"), load(source)
    changed = 0
    for name in ("layers.0.attention.qkv", "layers.1.mlp.down"):
        packed = ours.get_submodule(name).packed
        weight = exact.get_submodule(name).weight
        nearest = quantize_rtn(weight, 4, 16, "asym", lambda *_, p=packed: _ranges(p))
        pairs = [unpack(p.qweight, 4, weight.shape[1]).int() for p in (packed, nearest)]
        moved = pairs[0] - pairs[1]
        assert moved.abs().max() <= 1
        changed += int(moved.count_nonzero())
    assert changed


def _ranges(packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The grids of a packed matrix, as `quantize_rtn` takes them."""
    scales = packed.scales.float()
    return scales, -packed.qzeros.float() * scales


def test_a_layer_that_got_worse_stays_as_it_was(tmp_path, monkeypatch):
    source = saved("llama", tmp_path / "source")
    # One step, which goes half a bin at once.
    monkeypatch.setattr(tune_module, "STEPS", 1)
    options = QuantizeOptions(refine=True, tune=TuneOptions(steps=1, batch=1), distill=NONE)
    monkeypatch.setattr(refine, "descend_last", lambda layer, run, name, linear, *_: linear)
    notes, _ = tune(source, tmp_path / "out", plan_of(4, "gptq"), options=options)
    assert sum("stays as it was" in line for line in notes) == 4
    plain = QuantizeOptions()
    quantize_checkpoint(
        Job(source, plan_of(4, "gptq"), plain, samples=samples()), tmp_path / "plain"
    )
    files = [contents(tmp_path / name)["model.safetensors"] for name in ("out", "plain")]
    assert files[0] == files[1]


def test_what_transformers_makes_of_it(tmp_path):
    source = saved("opt", tmp_path / "source", torch.float16)
    plan = plan_of(4, group_size=-1)
    options = replace(OPTIONS, tune=TuneOptions(steps=3, batch=4))
    for name, fake in (("out", False), ("fake", True)):
        tune(source, tmp_path / name, plan, options=options, fake=fake, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fake", dtype=torch.float32)
    ours = load(tmp_path / "out").prefill(PROMPTS, last=False)
    assert_logits_close(ours, prefill_logits(theirs, PROMPTS), 5e-3)


def test_by_module_name_beside_other_algorithms(tmp_path):
    """Gradients go through what is not tuned, and it stays."""
    rules = {
        ".*": {"bits": 3, "algorithm": "signround"},
        "mlp.up": {"bits": 4, "algorithm": "awq"},
        r"layers\.0\.mlp\.down": "8:tc-li",
        r"layers\.0\.attention\.out": 16,
        "lm_head": 8,
    }
    source = saved("llama with all heads", tmp_path / "source")
    notes, reports = tune(source, tmp_path / "out", plan_of(rules))
    assert len(errors(notes)) == 3  # not the half with AWQ and int8
    assert len(reports) == 8
    out = load(tmp_path / "out")
    exact = load(source)
    left = (model.layers[0].attention.out.weight for model in (out, exact))
    assert torch.equal(*left)
    got = out.prefill(PROMPTS, last=False)
    assert (got - exact.prefill(PROMPTS, last=False)).square().mean() < 0.5 * got.var()


def test_killed_anywhere_and_gone_on_with(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    torch.set_num_threads(2)  # each of which has a part of the samples
    source = saved("opt-350m", tmp_path / "source")
    job = {"shard_bytes": 8000, "samples": samples(4, 12)}
    tuned, scales = TuneOptions(steps=2, batch=2), DistillOptions(steps=2, batch=2)
    options = QuantizeOptions(refine=True, tune=tuned, distill=scales)

    def run(target: Path) -> None:
        tune(source, target, plan_of(3, "gptq"), options=options, **job)

    with killed_at(10**6) as came:
        run(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    for number in range(3):
        target = tmp_path / str(number) / "out"
        assert is_killed(lambda target=target: run(target), len(came) * (2 * number + 1) // 6)
        run(target)
        assert contents(target) == expected


def test_threads_divide_samples_and_change_nothing_but_the_order_of_sums(tmp_path):
    source = saved("opt", tmp_path / "source")
    options = replace(OPTIONS, tune=TuneOptions(steps=3, batch=6), distill=DistillOptions(3, 6))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tune(source, tmp_path / str(threads), plan_of(8), options=options)
    one, two = (dict(load(tmp_path / str(threads)).named_modules()) for threads in (1, 2))
    for name, module in one.items():
        if isinstance(module, WeightOnlyLinear):
            ours, theirs = module.dequantize(), two[name].dequantize()
            assert (ours - theirs).abs().max() < 2 * module.packed.scales.max()
            assert ((ours - theirs).abs() < 1e-3 * ours.abs().max()).float().mean() > 0.95


def test_the_float_head_beside_a_quantized_one_has_its_bias(monkeypatch, tmp_path):
    source, found = saved("phi", tmp_path / "source"), []
    create = distill._Student.__init__

    def spy(student: distill._Student, *given: object, **options: object) -> None:
        create(student, *given, **options)
        found.append(student.float_head(torch.zeros(1, 48))[0])

    monkeypatch.setattr(distill._Student, "__init__", spy)
    options = QuantizeOptions(refine=True, tune=TuneOptions(steps=1), distill=DistillOptions(1, 2))
    tune(source, tmp_path / "out", plan_of({".*": 4, "^lm_head$": 8}), options=options)
    bias = load(source).lm_head.bias
    assert torch.allclose(found[0].float(), bias, atol=1e-2) and bias.abs().max() > 0.1


def test_the_seed_decides(tmp_path):
    source = saved("opt", tmp_path / "source")
    for name, seed in (("one", 0), ("two", 1)):
        options = QuantizeOptions(tune=TuneOptions(steps=4, batch=2, seed=seed), distill=NONE)
        tune(source, tmp_path / name, plan_of(3), options=options)
    files = [contents(tmp_path / name)["model.safetensors"] for name in ("one", "two")]
    assert files[0] != files[1]


def test_memory_is_asked_for_in_front(tmp_path, monkeypatch):
    """What tuning needs counts, so that it is refused in the beginning and not in the end."""
    needed: list[int] = []
    monkeypatch.setattr(checkpoint, "check_fits", lambda count, *_: needed.append(count))
    source = saved("opt", tmp_path / "source")
    for name, refined in (("plain", False), ("refined", True)):
        options = QuantizeOptions(refine=refined, tune=TuneOptions(steps=1), distill=NONE)
        tune(source, tmp_path / name, plan_of(4, "gptq"), options=options)
    assert needed[1] > needed[0]


@pytest.mark.parametrize(
    ("name", "head"),
    [("opt-350m", None), ("bloom", 4), pytest.param("llama", 4, marks=pytest.mark.slow)],
)
def test_scales_come_closer_to_the_float_model_and_nothing_else_changes(name, head, tmp_path):
    torch.set_num_threads(2)
    source = saved(name, tmp_path / "source", torch.float16)
    rules = {".*": 3} | ({} if head is None else {"lm_head": head})
    kept = []
    for steps in (0, 12):
        scales = DistillOptions(steps=steps, batch=16, rate=0.01)
        options = QuantizeOptions(tune=TuneOptions(steps=2, batch=2), distill=scales)
        out = tmp_path / str(steps)
        job = {"options": options, "dtype": torch.float32, "samples": SEEN}
        notes, _ = tune(source, out, plan_of(rules), **job)
        kept.append(load(out))
    words = next(line for line in notes if "divergence" in line).replace(",", "").split()
    numbers = [float(word) for word in words if word[0].isdigit()]
    assert numbers[1] < numbers[0]
    before, after = (dict(model.named_modules()) for model in kept)
    for part, module in before.items():
        if isinstance(module, WeightOnlyLinear):
            pair = module.packed, after[part].packed
            assert torch.equal(pair[0].qweight, pair[1].qweight)
            assert torch.equal(pair[0].qzeros, pair[1].qzeros)
            assert not torch.equal(pair[0].scales, pair[1].scales)
    found = [divergence(model, load(source)) for model in kept]
    assert found[1] < found[0]
    assert found == pytest.approx(numbers, rel=0.05)


def test_scales_of_more_bits_move_by_less(tmp_path):
    """The first step of Adam is the rate, whatever the gradient."""
    source = saved("opt", tmp_path / "source")
    rules = {".*": 2, "mlp": 3, r"mlp\.down": 4}
    kept = []
    for steps in (0, 1):
        scales = DistillOptions(steps=steps, batch=32, rate=0.02)
        options = QuantizeOptions(tune=TuneOptions(steps=1, batch=2), distill=scales)
        tune(source, tmp_path / str(steps), plan_of(rules), options=options, samples=SEEN)
        kept.append(dict(load(tmp_path / str(steps)).named_modules()))
    for part, module in kept[0].items():
        if isinstance(module, WeightOnlyLinear):
            moved = (kept[1][part].packed.scales.float() / module.packed.scales.float()).log()
            assert moved.abs().median() == pytest.approx(0.08 / 2**module.spec.bits, abs=5e-4)


def divergence(model: Decoder, exact: Decoder) -> float:
    """Mean over all tokens of the samples that are held out, in float64."""
    held = SEEN[held_out(len(SEEN))]
    ours, theirs = (
        each.prefill(held, last=False).double().log_softmax(-1) for each in (model, exact)
    )
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("widest", "dtype", "expected"),
    [(256, torch.bfloat16, 2048), (8192, torch.bfloat16, 1024), (8192, torch.float32, 512)],
)
def test_wide_layers_take_fewer_tokens_a_pass_on_a_cpu(widest, dtype, expected):
    tokens = tune_module.tokens_per_pass(widest, dtype, torch.device("cpu"))
    assert tokens == expected
    assert tune_module.tokens_per_pass(widest, dtype, torch.device("cuda")) == 2048


def test_a_bias_is_added_in_float32_a_few_rows_at_a_time(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    y, bias = (torch.randn(shape, generator=draw) for shape in ((7, 5), (5,)))
    monkeypatch.setattr(tune_module, "BIASED_AT_ONCE", 2 * len(bias))
    rounded = y.bfloat16()
    expected = (rounded.float() + bias).bfloat16()
    assert torch.equal(tune_module.add_bias(rounded, bias), expected)
    assert torch.equal(tune_module.add_bias(y.clone(), bias), y + bias)


def test_scales_are_stepped_as_by_torch():
    draw = torch.Generator().manual_seed(0)
    spec = QuantSpec.parse("2", 8)
    weight = torch.randn(4, 16, generator=draw)
    linear = ScaledLinear(
        WeightOnlyLinear.from_float(weight, None, spec), torch.float32, Workers(weight.device)
    )
    expected = torch.zeros_like(linear.factors).requires_grad_()
    adam = torch.optim.Adam([expected], betas=(0.9, 0.95))
    for number, rate in enumerate((0.02, 0.01, 0.005), start=1):
        gradient = torch.randn(linear.factors.shape, generator=draw)
        expected.grad, adam.param_groups[0]["lr"] = gradient, rate
        linear.gradient.add(gradient)
        linear.step(number, rate)
        adam.step()
    assert torch.equal(linear.factors, expected)


def tuned_scales(model: Decoder) -> tuple[dict[str, torch.Tensor], float, float]:
    """What tuning finds in a few steps, of a model that is to put out zeros."""
    targets = torch.zeros(3, 8, model.config.hidden_size)
    options = DistillOptions(steps=8, batch=2, rate=0.03)
    with torch.no_grad():
        return distill.tune_scales(model, samples(3, 8), targets, None, options, lambda _: None)


def test_layers_are_computed_again_on_whatever_thread_goes_back(tmp_path, monkeypatch):
    """On GPUs it is one of autograd's own, which is in none of the modes of the one that asks."""
    source, backward = saved("llama", tmp_path), torch.Tensor.backward
    expected, *divergences = tuned_scales(load(source, "4"))

    def on_another_thread(self: torch.Tensor, *given: torch.Tensor) -> None:
        errors: list[BaseException] = []

        def run() -> None:
            try:
                backward(self, *given)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        for error in errors:
            raise error

    monkeypatch.setattr(distill, "ACTIVATIONS_AT_ONCE", 0)
    monkeypatch.setattr(torch.Tensor, "backward", on_another_thread)
    found, *again = tuned_scales(load(source, "4"))
    assert (
        again == pytest.approx(divergences, rel=1e-5) and found.keys() == expected.keys() != set()
    )
    for name, scales in found.items():
        torch.testing.assert_close(scales, expected[name])


def test_norms_in_front_of_int8_layers_are_no_longer_theirs(tmp_path, gpu):
    """On GPUs they make int8 of what they put out, which matrices in their place cannot take."""
    source, plan = saved("llama", tmp_path), plan_of({".*": "4", "mlp": "8:tc-li"}, "rtn")
    model = load(source, plan=plan, device=gpu)
    assert model.layers[0].mlp_norm.op == "rms_norm_int8"
    _, before, after = tuned_scales(model)
    assert model.layers[0].mlp_norm.op == "rms_norm" and 0 < after < before
