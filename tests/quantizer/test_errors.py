"""Calibrated algorithms do what they are for, and options reach them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny
from covering import slow_but
from oracle import assert_logits_close, load
from quantizer_cases import (
    LAYOUTS,
    PROMPTS,
    assert_saved_and_fake_agree,
    plan_of,
    quantize,
    relative,
    tensors_of,
)
from quantizing import MODELS, STACKED, TEXT, samples
from torch import Tensor

from qllm.config import LM_HEAD, QuantPlan, QuantSpec
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import ReorderedLinear
from qllm.models import FAMILIES as FAMILY_TABLE
from qllm.models import Decoder
from qllm.quant import gptq as gptq_module
from qllm.quant.algorithm import GPTQOptions, QuantizeOptions
from qllm.quant.rtn import quantize_rtn
from qllm.quantizer import hidden
from qllm.quantizer import layer as layer_module
from qllm.quantizer.layer import LinearReport
from qllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def linears_of(model: Decoder) -> list[str]:
    return [*FAMILY_TABLE[model.config.family].layer_linears(model.config)]


def inputs_of(model: Decoder, texts: list[list[int]]) -> dict[str, Tensor]:
    """What each quantized linear sees of some samples: (M, K)."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str, module: torch.nn.Module):
        def see(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
            seen.setdefault(name, []).append(inputs[0])

        return module.register_forward_pre_hook(see)

    linears = {n: m for n, m in model.named_modules() if hasattr(m, "dequantize")}
    hooks = [watch(name, module) for name, module in linears.items()]
    for sample in texts:
        model.prefill([sample], last=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.covering(1)
@pytest.mark.parametrize("per_pass", [2048, 70])
@pytest.mark.parametrize("name", [*LAYOUTS, "bloom with normed residuals", "gpt_neox", "qwen2_moe"])
def test_what_is_reported_of_gptq_is_the_error_behind_quantized_layers(
    name, per_pass, sources, monkeypatch, tmp_path
):
    """True-sequential: the inputs of a linear are those that it has in the quantized model."""
    monkeypatch.setattr(hidden, "TOKENS_PER_PASS", per_pass)  # 70: two samples, and one at the end
    source, texts = sources(name), samples(5, 30)
    plan = plan_of(3, "4", algorithm="gptq")
    reports = quantize(source, tmp_path / "out", plan, samples=texts)
    ours, exact = load(tmp_path / "out"), load(source)
    inputs = inputs_of(ours, texts)
    assert [entry.name for entry in reports] == [*linears_of(ours), LM_HEAD]
    for entry in reports:
        module, original = (m.get_submodule(entry.name) for m in (ours, exact))
        x, weight = inputs[entry.name].double(), original.dequantize().double()
        error = x @ (module.dequantize().double() - weight).t()
        assert entry.error == pytest.approx(relative(error, x @ weight.t()), rel=1e-3)
        assert (entry.of_output, entry.channels, entry.damp) == (True, x.shape[1], 0.01)
        assert entry.dead == (x.abs().amax(dim=0) == 0).sum()


def test_what_is_reported_of_rtn_is_the_error_of_weights(sources, tmp_path):
    reports = quantize(sources("bloom"), tmp_path / "out", plan_of({".*": 3, "mlp": "8:tc-li"}))
    ours, exact = load(tmp_path / "out"), load(sources("bloom"))
    assert [entry.name for entry in reports] == linears_of(ours)
    for entry in reports:
        before, after = (m.get_submodule(entry.name).dequantize() for m in (exact, ours))
        assert entry.error == pytest.approx(relative(after - before, before), rel=1e-4)
        assert (entry.of_output, entry.damp, entry.dead) == (False, 0.0, 0)


def read(family: str) -> tuple[list[list[int]], list[list[int]]]:
    """Samples of a text for calibration, and of the rest of it."""
    ids = Tokenizer.load(tiny(family), 4096).encode(TEXT)
    unseen = range(len(ids) - 600, len(ids), 100)
    return [ids[i : i + 64] for i in range(0, 1024, 64)], [ids[i : i + 100] for i in unseen]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_is_better_than_rounded_to_nearest(family, shallow_of, monkeypatch, tmp_path):
    compared = []

    def gptq(weight, hessian, bits, group_size, scheme, *rest):
        found = whole_gptq(weight, hessian, bits, group_size, scheme, *rest)
        nearest = quantize_rtn(weight, bits, group_size, scheme)
        compared.append([error_of(p, weight, hessian) for p in (found[0], nearest)])
        return found

    def error_of(packed, weight, hessian) -> float:
        spec = QuantSpec.parse(3, 128)
        linear = layer_module.WeightOnlyLinear.from_packed(packed, None, spec, weight.shape[1])
        return layer_module._relative_error(linear, weight, hessian)

    whole_gptq = gptq_module.quantize_gptq
    monkeypatch.setattr(gptq_module, "quantize_gptq", gptq)
    plan = plan_of(3, algorithm="gptq", group_size=128)
    reports = quantize(shallow_of(family), tmp_path / "out", plan, samples=read(family)[0])
    assert len(compared) == 8
    for entry, (ours, nearest) in zip(reports, compared, strict=True):
        assert entry.error == pytest.approx(ours, rel=1e-4)
        assert ours < nearest * 0.95


def divergence(model: Decoder, exact: Decoder, prompts: list[list[int]]) -> float:
    """Mean Kullback-Leibler divergence of the next token from the 16-bit model's."""
    logs = [m.prefill(prompts, last=False).log_softmax(-1) for m in (exact, model)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()


@pytest.mark.parametrize(("family",), slow_but([("bloom",)], FAMILIES))
def test_the_model_is_better_than_rounded_to_nearest(family, shallow_of, tmp_path):
    """On text that calibration did not see."""
    seen, unseen = read(family)
    source = shallow_of(family)
    exact = load(source)
    found = {}
    for algorithm in ("rtn", "gptq", "awq"):
        rules = {r"layers\.1\.": {"bits": 3, "algorithm": algorithm}}
        plan = plan_of(rules, group_size=128)
        samples = None if algorithm == "rtn" else seen
        quantize(source, tmp_path / algorithm, plan, samples=samples)
        found[algorithm] = divergence(load(tmp_path / algorithm), exact, unseen)
    assert found["gptq"] < 0.2 * found["rtn"]
    assert found["awq"] < 0.8 * found["rtn"]


def left_dense(module, name, spec, stats, options):
    """What stands for `quantize_linear`: all but the rounding."""
    linear = DenseLinear(module.weight, module.bias, QuantSpec())
    return linear, LinearReport(name, spec, 0.0, False, module.in_features)


@pytest.mark.covering(1)
@pytest.mark.parametrize("plan", [plan_of("8:tc-li"), plan_of(4, algorithm="awq")])
@pytest.mark.parametrize("name", MODELS)
def test_what_equalizes_leaves_the_model_as_it_was(name, plan, sources, monkeypatch, tmp_path):
    """SmoothQuant and AWQ: all that they change is written."""
    monkeypatch.setattr(layer_module, "quantize_linear", left_dense)
    source = sources(name)
    quantize(source, tmp_path / "out", plan, samples=samples(), fake=True)
    logits = [load(folder).prefill(PROMPTS, last=False) for folder in (tmp_path / "out", source)]
    assert_logits_close(*logits)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = after.keys() - {key for key in after if name in STACKED and ".experts." in key}
    changed = {key for key in kept if not torch.equal(after[key], before[key])}
    assert changed
    assert all("layers" in key or ".h." in key for key in changed)
    # What scales the input divides what gives it: both are there, or neither.
    norms = [key for key in changed if "norm" in key or ".ln_" in key]
    unfolded = ("opt-350m", "galactica", "bloom with normed residuals", "olmo2", "cohere2")
    unfolded += ("phi", "qwen3_next")
    foldable = name not in unfolded
    assert bool(norms) == foldable


def test_alpha_is_how_much_is_smoothed(sources, tmp_path):
    weights = {}
    for alpha in (0.0, 0.5, 1.0):
        options = QuantizeOptions(smooth_alpha=alpha)
        plan = plan_of("8:tc-li")
        target = tmp_path / str(alpha)
        quantize(sources("llama"), target, plan, samples=samples(), options=options, fake=True)
        weights[alpha] = tensors_of(target)["model.layers.0.input_layernorm.weight"]
    assert not torch.equal(weights[0.0], weights[0.5])
    assert not torch.equal(weights[1.0], weights[0.5])


def quantized_tensors(source: Path, target: Path, plan: QuantPlan, **job) -> dict[str, Tensor]:
    quantize(source, target, plan, samples=samples(), **job)
    return tensors_of(target)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_true_sequential_sees_the_quantized_linears_in_front(sources, tmp_path):
    plan = plan_of(3, algorithm="gptq")
    found = [
        quantized_tensors(
            sources("llama"), tmp_path / str(options.true_sequential), plan, options=options
        )
        for options in (QuantizeOptions(true_sequential=flag) for flag in (True, False))
    ]
    first = "model.layers.0.self_attn.{}_proj.qweight"
    for name in "qkv":  # in front of which nothing is
        assert torch.equal(*(tensors[first.format(name)] for tensors in found))
    assert not torch.equal(*(tensors[first.format("o")] for tensors in found))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("act_order", [False, True])
def test_groups_as_they_come(name, act_order, sources, tmp_path):
    """Without static groups, those of channels in another order are no runs."""
    gptq = GPTQOptions(act_order=act_order, static_groups=False)
    plan = plan_of(4 if name != "bloom" else 5, "8", algorithm="gptq")
    options = QuantizeOptions(gptq=gptq)
    ours = assert_saved_and_fake_agree(
        sources(name), tmp_path, plan, samples=samples(), options=options
    )
    kinds = {type(m) for n, m in ours.named_modules() if ".mlp." in n and hasattr(m, "packed")}
    assert (ReorderedLinear in kinds) == act_order
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "gptq":
        assert config["desc_act"] == act_order
    else:
        actorder = config["config_groups"]["group_0"]["weights"].get("actorder")
        assert actorder == ("group" if act_order else None)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
def test_clipping(algorithm, sources, tmp_path):
    """It is what AWQ does of itself, and the others when they are told."""
    plan = plan_of(2, algorithm=algorithm)
    found = {
        clip: quantized_tensors(
            sources("opt"), tmp_path / str(clip), plan, options=QuantizeOptions(clip=clip)
        )
        for clip in (None, True, False)
    }
    assert same(found[None], found[algorithm == "awq"])
    assert not same(found[None], found[algorithm != "awq"])
    if algorithm == "awq":  # what makes the scores of attention is left as it is
        qkv = [key for key in found[True] if "layers.0.self_attn." in key and "out_" not in key]
        assert len(qkv) == 3 * 5
        assert all(torch.equal(found[True][key], found[False][key]) for key in qkv)


@pytest.mark.parametrize(
    "gptq", [GPTQOptions(damp=1.0), GPTQOptions(act_order=False), GPTQOptions(static_groups=False)]
)
def test_options_of_gptq_reach_it(gptq, sources, tmp_path):
    plan = plan_of(3, algorithm="gptq")
    plain = quantized_tensors(sources("llama"), tmp_path / "plain", plan)
    options = QuantizeOptions(gptq=gptq)
    assert not same(
        plain, quantized_tensors(sources("llama"), tmp_path / "other", plan, options=options)
    )


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_activations_between_layers_have_the_type_that_is_asked_for(algorithm, sources, tmp_path):
    plan, source = plan_of(3, algorithm=algorithm), sources("opt", torch.bfloat16)
    own = quantized_tensors(source, tmp_path / "own", plan)
    assert same(own, quantized_tensors(source, tmp_path / "a", plan, dtype=torch.bfloat16))
    assert not same(own, quantized_tensors(source, tmp_path / "b", plan, dtype=torch.float32))
