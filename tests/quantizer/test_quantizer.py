"""Checkpoints quantized by every algorithm: saved, loaded, and read by transformers."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import FORMS
from conftest import FAMILIES, tiny
from covering import each, slow_but
from foreign import twin_of
from killing import contents, is_killed, killed_at
from oracle import assert_logits_close, draw_prompts, load, prefill_logits
from quantizing import MODELS, TEXT, VOCAB, samples, saved
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qllm import ops
from qllm.checkpoint.convert import convert
from qllm.checkpoint.formats import parse
from qllm.checkpoint.load import load_model
from qllm.config import LM_HEAD, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.hub import ModelFolder
from qllm.layers.fp16 import DenseLinear
from qllm.layers.weight_only import ReorderedLinear
from qllm.models import FAMILIES as FAMILY_TABLE
from qllm.models import Decoder
from qllm.quant import gptq as gptq_module
from qllm.quant.algorithm import GPTQOptions, QuantizeOptions
from qllm.quant.rtn import quantize_rtn
from qllm.quantizer import hidden
from qllm.quantizer import layer as layer_module
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.quantizer.layer import LinearReport
from qllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("opt", "opt-350m", "bloom", "llama")  # one of each layout of tensors
LAYOUTS = [
    *SMALL,
    "opt untied",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "phi3")),
]
LINEARS = [*FAMILY_TABLE["opt"].layer_linears(2)]
PROMPTS = draw_prompts([7, 1, 12], VOCAB)


def plan_of(
    value: object, head: str | None = None, *, group_size: int = 16, **default: str
) -> QuantPlan:
    """A plan of a bitwidth or of rules, and of --lm-head-bits."""
    spec = QuantSpec(group_size=group_size, **default)
    if isinstance(value, dict):
        plan = QuantPlan.from_json(value, default=spec)
    else:
        plan = QuantPlan.parse(str(value), spec)
    return plan if head is None else plan.with_rule("^lm_head$", QuantSpec.from_json(head, spec))


def quantize(source: Path, target: Path, plan: QuantPlan, **job) -> list[LinearReport]:
    return quantize_checkpoint(Job(source, plan, **job), target)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """What is in a folder's files, whichever they are."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_same_tensors(ours: Decoder, theirs: Decoder) -> None:
    """Two models hold the same, tensor by tensor, and say the same of it."""
    specs = [
        {n: m.spec for n, m in model.named_modules() if hasattr(m, "spec")}
        for model in (ours, theirs)
    ]
    assert specs[0] == specs[1]
    first, second = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of one of MODELS, made once."""
    made: dict[tuple, Path] = {}

    def source(name: str, dtype: torch.dtype = torch.float32) -> Path:
        if (name, dtype) not in made:
            made[name, dtype] = saved(name, tmp_path_factory.mktemp("source") / "model", dtype)
        return made[name, dtype]

    return source


# ---- rounding to nearest: what is saved is what loading makes


MIXED = {
    ".*": 4,
    "mlp": {"bits": 3, "scheme": "sym", "group_size": -1},
    r"layers\.1\.attention": "8:tc-li",
    r"layers\.0\.attention\.out": 16,
}


BITS = (*range(1, 9), "8:tc-li", "mixed")
TIED_OR_NOT = (*SMALL, "opt untied")


@pytest.mark.parametrize(("name", "bits"), slow_but(each(TIED_OR_NOT, BITS), TIED_OR_NOT, BITS))
def test_saved_is_what_loading_makes(name, bits, sources, tmp_path):
    source = sources(name, torch.float16)
    # Heads of a width of their own, tied or not; none for an odd one.
    head = {1: "8", 2: "8:tc-li", 3: "3", 4: "4"}.get(bits)
    scheme = "sym" if bits in (2, 5, 8) else "asym"
    plan = plan_of(MIXED if bits == "mixed" else bits, head, scheme=scheme)
    quantize(source, tmp_path / "out", plan)
    ours, expected = load_model(tmp_path / "out", QuantPlan.parse("16")), load_model(source, plan)
    assert_same_tensors(ours, expected)
    assert torch.equal(ours.prefill(PROMPTS), expected.prefill(PROMPTS))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    usual = bits in (3, 4, 8)  # and no head that GPTQ cannot hold
    method = config["quantization_config"]["quant_method"]
    assert method == ("gptq" if usual else "compressed-tensors")
    tied = head is None and MODELS[name].tie_word_embeddings
    assert ours.config.tied_head == config["tie_word_embeddings"] == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bundled_models_are_what_loading_makes(family, tmp_path):
    plan = plan_of({".*": 4, "mlp": 3}, group_size=128)
    quantize(tiny(family), tmp_path / "out", plan)
    ours = load_model(tmp_path / "out", QuantPlan.parse("16"))
    assert_same_tensors(ours, load_model(tiny(family), plan))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny(family) / name).read_bytes()


@pytest.mark.parametrize("form", ["bin", "safetensors-sharded"])
def test_every_form_of_source_gives_the_same(form, sources, tmp_path):
    whole = sources("llama", torch.bfloat16)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(whole / name, source / name)
    FORMS[form](source, load_file(whole / "model.safetensors"))
    plan = plan_of(3, algorithm="gptq")
    for name, folder in (("out", source), ("expected", whole)):
        quantize(folder, tmp_path / name, plan, samples=samples())
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize("algorithm", ["rtn", "awq"])
@pytest.mark.parametrize("name", [*LAYOUTS, "gpt_neox"])
def test_a_converted_source_gives_the_same(name, algorithm, sources, tmp_path):
    source = sources(name)
    convert(ModelFolder(source, "model"), tmp_path / "converted", overwrite=False)
    plan = plan_of(4, "8", algorithm=algorithm)
    for target, folder in (("out", tmp_path / "converted"), ("expected", source)):
        quantize(folder, tmp_path / target, plan, samples=samples())
    out, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[key], expected[key]) for key in expected)
    configs = [
        json.loads((tmp_path / target / "config.json").read_text())
        for target in ("out", "expected")
    ]
    configs[0]["tie_word_embeddings"] = configs[1]["tie_word_embeddings"]
    assert configs[0].pop("qllm_base_model") == str(source.resolve())
    assert configs[0] == configs[1]


# ---- every algorithm on every kind of model


def assert_saved_and_fake_agree(source: Path, folder: Path, plan: QuantPlan, **job) -> Decoder:
    """The saved model computes what transformers does with its dequantized twin; returns it."""
    reports = quantize(source, folder / "saved", plan, **job)
    assert quantize(source, folder / "fake", plan, fake=True, **job) == reports
    ours = load(folder / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "fake", dtype=torch.float32).eval()
    assert_logits_close(ours.prefill(PROMPTS, last=False), prefill_logits(theirs, PROMPTS))
    assert_logits_close(
        load(folder / "fake").prefill(PROMPTS, last=False), prefill_logits(theirs, PROMPTS)
    )
    return ours


ALGORITHMS = ("rtn", "gptq", "awq")


@pytest.mark.parametrize(
    ("name", "algorithm"),
    slow_but(each(MODELS, ALGORITHMS), MODELS, ALGORITHMS),
)
def test_the_dequantized_twin_in_transformers(name, algorithm, sources, tmp_path):
    plan = plan_of(4, "8", algorithm=algorithm)
    ours = assert_saved_and_fake_agree(sources(name), tmp_path, plan, samples=samples())
    exact = load(sources(name)).prefill(PROMPTS, last=False)
    got = ours.prefill(PROMPTS, last=False)
    assert (got - exact).square().mean() < 0.5 * exact.var()
    entries = json.loads((tmp_path / "fake" / "weight_config.json").read_text())
    weights = tensors_of(tmp_path / "fake")
    found = {entry["algorithm"] for entry in entries.values() if entry["bits"] != "16"}
    assert found == {algorithm}
    assert {f"{part}.weight" for part in entries} <= weights.keys()
    assert entries["lm_head"] == {
        "bits": 8,
        "group_size": 16,
        "scheme": "asym",
        "algorithm": algorithm,
    }


@pytest.mark.parametrize(
    ("name", "bitwidth"),
    slow_but(each(MODELS, ("8:tc-li", "8:tc")), MODELS, ("8:tc-li", "8:tc")),
)
def test_int8_activations_run_from_what_is_saved(name, bitwidth, sources, tmp_path):
    quantize(sources(name), tmp_path / "out", plan_of(bitwidth, "8:tc-li"), samples=samples())
    ours, exact = load(tmp_path / "out"), load(sources(name))
    got, expected = (model.prefill(PROMPTS, last=False) for model in (ours, exact))
    assert got.isfinite().all()
    assert (got - expected).square().mean() < 0.05 * expected.var()
    scales = [value for key, value in ours.named_buffers() if key.endswith("input_scale")]
    assert len(scales) == (8 if bitwidth == "8:tc" else 0)
    assert all(scale > 0 for scale in scales)


def test_algorithms_side_by_side(sources, tmp_path):
    """Each layer half and half, a linear that is left, and a layer that is."""
    rules = {
        ".*": {"bits": 4, "algorithm": "gptq"},
        r"layers\.0\.mlp": {"bits": 3, "algorithm": "awq"},
        r"layers\.0\.mlp\.down": {"bits": 8, "algorithm": "rtn"},
        r"layers\.1\.attention": {"bits": 6, "algorithm": "awq"},
        r"layers\.1\.mlp\.up": 16,
    }
    plan = plan_of(rules, "4")
    for name in SMALL:
        folder = tmp_path / name
        ours = assert_saved_and_fake_agree(sources(name), folder, plan, samples=samples())
        assert isinstance(ours.layers[1].mlp.up, DenseLinear)
        written = json.loads((folder / "fake" / "weight_config.json").read_text())
        assert {entry["algorithm"] for entry in written.values()} == {"gptq", "awq", "rtn"}


def test_a_whole_layer_that_is_left_is_as_it_was(sources, tmp_path):
    source = sources("llama", torch.float16)
    quantize(source, tmp_path / "out", plan_of({r"layers\.1\.": "3"}), samples=samples())
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = [name for name in before if "layers.0." in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


# ---- calibrated algorithms do what they are for


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


def relative(error: Tensor, whole: Tensor) -> float:
    return (error.double().square().sum() / whole.double().square().sum()).sqrt().item()


@pytest.mark.parametrize("per_pass", [2048, 70])
@pytest.mark.parametrize("name", [*LAYOUTS, "bloom with normed residuals", "gpt_neox"])
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
    assert [entry.name for entry in reports] == [*LINEARS, LM_HEAD]
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
    assert [entry.name for entry in reports] == LINEARS
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
def test_each_linear_is_better_than_rounded_to_nearest(family, monkeypatch, tmp_path):
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
    rules = {r"layers\.[03]\.": {"bits": 3, "algorithm": "gptq"}}
    plan = plan_of(rules, group_size=128)
    reports = quantize(tiny(family), tmp_path / "out", plan, samples=read(family)[0])
    assert len(compared) == 8
    for entry, (ours, nearest) in zip(reports, compared, strict=True):
        assert entry.error == pytest.approx(ours, rel=1e-4)
        assert ours < nearest * 0.95


def divergence(model: Decoder, exact: Decoder, prompts: list[list[int]]) -> float:
    """Mean Kullback-Leibler divergence of the next token from the 16-bit model's."""
    logs = [m.prefill(prompts, last=False).log_softmax(-1) for m in (exact, model)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()


@pytest.mark.parametrize(("family",), slow_but([("bloom",)], FAMILIES))
def test_the_model_is_better_than_rounded_to_nearest(family, tmp_path):
    """On text that calibration did not see."""
    seen, unseen = read(family)
    exact = load(tiny(family))
    found = {}
    for algorithm in ("rtn", "gptq", "awq"):
        rules = {r"layers\.1\.": {"bits": 3, "algorithm": algorithm}}
        plan = plan_of(rules, group_size=128)
        samples = None if algorithm == "rtn" else seen
        quantize(tiny(family), tmp_path / algorithm, plan, samples=samples)
        found[algorithm] = divergence(load(tmp_path / algorithm), exact, unseen)
    assert found["gptq"] < 0.2 * found["rtn"]
    assert found["awq"] < 0.8 * found["rtn"]


def left_dense(module, name, spec, stats, options):
    """What stands for `quantize_linear`: all but the rounding."""
    linear = DenseLinear(module.weight, module.bias, QuantSpec())
    return linear, LinearReport(name, spec, 0.0, False, module.in_features)


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
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed
    assert all("layers" in key or ".h." in key for key in changed)
    # What scales the input divides what gives it: both are there, or neither.
    norms = [key for key in changed if "norm" in key or ".ln_" in key]
    foldable = name not in ("opt-350m", "galactica", "bloom with normed residuals")
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


# ---- options


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


# ---- files


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_shards(algorithm, sources, tmp_path):
    plan, source = plan_of(4, "8", algorithm=algorithm), sources("llama")
    quantize(source, tmp_path / "whole", plan, samples=samples())
    quantize(source, tmp_path / "parts", plan, samples=samples(), shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    for path in (tmp_path / "parts").glob("*.safetensors"):
        parts = [tensor.nbytes for tensor in load_file(path).values()]
        assert sum(parts) <= 10_000 or len(parts) == 1
    assert_same_tensors(load(tmp_path / "parts"), load(tmp_path / "whole"))


@pytest.mark.parametrize("plan", [plan_of(4, "4", algorithm="gptq"), plan_of("8:tc")])
def test_two_runs_give_the_same_bytes(plan, sources, tmp_path):
    for name in ("one", "two"):
        quantize(sources("opt"), tmp_path / name, plan, samples=samples(), about={"model": "m"})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert set(contents(tmp_path / "one")) == {
        *("model.safetensors", "config.json", "generation_config.json", "README.md")
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", plan_of(4, "8", algorithm="gptq")),
        ("opt-350m", plan_of({".*": 3, "mlp": {"bits": 4, "algorithm": "awq"}}, "4")),
        ("bloom", plan_of("8:tc")),
        ("opt", plan_of(5)),
    ],
)
def test_killed_anywhere_and_gone_on_with(name, plan, sources, monkeypatch, tmp_path):
    """At some of all places; test_resume.py takes each of them."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    needs = plan_of(5) != plan
    job = {"shard_bytes": 8000, "samples": samples(3, 12) if needs else None}

    def run(target: Path) -> None:
        quantize(sources(name), target, plan, **job)

    # What the first run alone does must not count: a checkpoint is made, kernels are compiled.
    sources(name)
    ops.prepare("cpu")
    with killed_at(10**6) as came:
        run(tmp_path / "expected")
    expected = contents(tmp_path / "expected")
    for number in range(12):
        point = len(came) * number // 12 if number < 9 else len(came) - 4 * (12 - number)
        target = tmp_path / str(point) / "out"
        assert is_killed(lambda target=target: run(target), point)
        is_killed(lambda target=target: run(target), len(came) // 5)
        if not target.exists():
            run(target)
        assert contents(target) == expected


def test_other_options_do_not_go_on_with_a_run(sources, tmp_path):
    plan, target = plan_of(4, algorithm="gptq"), tmp_path / "out"
    job = Job(sources("opt"), plan, samples=samples())
    assert is_killed(lambda: quantize_checkpoint(job, target), 60)
    for change, words in (
        ({"plan": plan_of(3, algorithm="gptq")}, "layers "),
        ({"samples": samples(seed=1)}, "calibration samples "),
        ({"options": QuantizeOptions(gptq=GPTQOptions(damp=0.1))}, "option gptq "),
        ({"fake": True}, "fake false, this one has true"),
        ({"shard_bytes": 10**6}, "shard size 5000000000, this one has 1000000"),
        ({"dtype": torch.bfloat16}, 'dtype "None", this one has "torch.bfloat16"'),
        ({"source": tiny("opt")}, "model "),
    ):
        with pytest.raises(UserError, match="interrupted run") as error:
            quantize_checkpoint(replace(job, **change), target)
        assert words in str(error.value)

    lines: list[str] = []
    counted: list[float] = []

    def meter(total: int, done: int) -> nullcontext:
        counted.extend([total, -done])
        return nullcontext(lambda count: counted.append(-count))

    reports = quantize_checkpoint(job, target, meter, lines.append)
    assert lines[0] == "going on at layers.1, 1 of 2 layers are done"
    ours = [report for report in reports if report.name.startswith("layers.1.")]
    assert lines[1:-1] == [
        f"{report.name}: relative error {report.error:.2%} of the outputs" for report in ours
    ]
    assert lines[-1].startswith("loads in QLLM, ")
    total, done, *steps = counted
    assert done == -total / 2 and len(steps) > len(ours) and max(steps) < 0
    assert sum(counted) == pytest.approx(0, abs=0.5)
    assert load(target).prefill(PROMPTS).isfinite().all()


def test_a_source_that_changed_does_not_go_on(sources, tmp_path):
    source = shutil.copytree(sources("opt"), tmp_path / "source")
    job = Job(source, plan_of(4))
    assert is_killed(lambda: quantize_checkpoint(job, tmp_path / "out"), 30)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(UserError, match="state of the model"):
        quantize_checkpoint(job, tmp_path / "out")


def test_what_stands_in_the_way_may_be_mended(sources, tmp_path):
    """A run that failed lets go of what it held, even while its error is at hand."""
    source = shutil.copytree(sources("opt"), tmp_path / "source")
    whole = load_file(source / "model.safetensors")
    broken = {name: tensor.clone() for name, tensor in whole.items()}
    broken["model.decoder.layers.1.fc2.weight"][3, 3] = torch.nan
    FORMS["safetensors"](source, broken)
    with pytest.raises(UserError, match=r"layers\.1\.fc2\.weight holds NaN") as error:
        quantize(source, tmp_path / "out", plan_of(4))
    with pytest.raises(UserError, match=r"layers\.1\.fc2\.weight holds NaN"):
        quantize(source, tmp_path / "out", plan_of(4))
    assert "NaN" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_card_and_the_config_say_how_it_was_made(sources, tmp_path):
    about = {"model": "facebook/opt", "dataset": "words.txt", "samples": "6 of 24 tokens, seed 0"}
    rules = {".*": {"bits": 4, "algorithm": "gptq"}, "mlp": "8:tc"}
    reports = quantize(
        sources("opt"), tmp_path / "out", plan_of(rules), samples=samples(), about=about
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "# facebook/opt, quantized\n" in card
    for line in (
        "- dataset: words.txt",
        "- samples: 6 of 24 tokens, seed 0",
        "- GPTQ: dampening 0.01, block 128, act-order yes, static groups yes, true-sequential yes",
        "- SmoothQuant: alpha 0.5",
    ):
        assert f"{line}\n" in card
    assert "AWQ" not in card
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| layers.")]
    assert [row[0].removeprefix("| ") for row in rows] == [entry.name for entry in reports]
    assert [float(row[3]) for row in rows] == [round(entry.error, 5) for entry in reports]
    assert {row[1] for row in rows} == {"4 bits, group 16, asym", "8:tc"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((sources("opt") / "config.json").read_text())
    config.pop("quantization_config")
    assert config.pop("qllm_algorithm") == "gptq; smoothquant"
    assert config == {**source, "tie_word_embeddings": True}


COMPRESSED = {
    "4 bits": ({"bits": 4, "group_size": 16}, True),
    "4 bits, symmetric": ({"bits": 4, "group_size": 16, "scheme": "sym"}, True),
    "5 bits": ({"bits": 5, "group_size": 32}, True),
    "3 bits per channel": ({"bits": 3, "group_size": -1}, True),
    "int8": ("8:tc-li", True),
    "groups that do not divide": ({"bits": 5, "group_size": 24}, False),
    "two specs": ({".*": {"bits": 4, "group_size": 16}, "mlp": 8}, False),
    "two specs, symmetric": (
        {".*": {"bits": 4, "group_size": 16, "scheme": "sym"}, "mlp": "8:tc-li"},
        True,
    ),
}


FUSED = ("4 bits, symmetric", "3 bits per channel", "int8")
FAMILIES_OF_FUSED = ("phi3", "gemma3_text", "gpt_neox")


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *slow_but(each(FAMILIES, COMPRESSED), FAMILIES, COMPRESSED),
        *slow_but(each(FAMILIES_OF_FUSED, FUSED), FAMILIES_OF_FUSED, FUSED),
    ],
)
def test_transformers_loads_what_is_said_to_load(family, form, tmp_path):
    """As the card has it, without an option."""
    spec, loads = COMPRESSED[form]
    notes: list[str] = []
    twin_of(family).save_pretrained(tmp_path / "source")  # inputs are multiples of 32
    rules = spec if ".*" in spec else {".*": spec}
    job = Job(tmp_path / "source", plan_of(rules), compressed=True)
    quantize_checkpoint(job, tmp_path / "out", note=notes.append)
    card = (tmp_path / "out" / "README.md").read_text()
    assert notes[-1].startswith("loads in QLLM, transformers (with") == loads
    assert (notes[-1] in card) and ("AutoModelForCausalLM" in card) == loads
    if not loads:
        with pytest.raises((RuntimeError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompts = draw_prompts([7, 1, 12], 96)
    ours = load(tmp_path / "out").prefill(prompts, last=False)
    # It dequantizes to the type of the scales, float16, and rounds int8 activations otherwise.
    tolerance = 2e-2 if "8:tc-li" in str(spec) else 5e-3
    assert_logits_close(ours, prefill_logits(theirs, prompts), tolerance)


def test_conv1d_stays_dense_in_compressed_tensors(tmp_path):
    """transformers loads GPT-2's integers into no layer, and says nothing."""
    notes: list[str] = []
    job = Job(saved("gpt2", tmp_path / "source"), plan_of(4, group_size=-1), compressed=True)
    quantize_checkpoint(job, tmp_path / "out", note=notes.append)
    assert "not in transformers: this family's layers are Conv1D" in notes[-1]


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            {"bits": 4, "group_size": 32, "scheme": "sym"},
            "loads in QLLM, transformers (with optimum gptqmodel), vLLM",
        ),
        (
            {"bits": 4, "group_size": 32},
            "loads in QLLM, transformers (with optimum gptqmodel); not in vLLM: it takes GPTQ of 4 "
            "and 8 bits, with --scheme sym",
        ),
        (
            {"bits": 8, "group_size": 24, "scheme": "sym"},
            'loads in QLLM, transformers (with optimum gptqmodel and its backend "torch"); not in '
            "vLLM: groups of 24 do not divide the 64 inputs of layers.0.attention.qkv, as groups "
            "of 8 would",
        ),
    ],
)
def test_where_gptq_loads(spec, line, tmp_path):
    """GPTQModel 7.7.0 was seen to load these on a CPU, and without that backend not the last."""
    notes: list[str] = []
    twin_of("llama").save_pretrained(tmp_path / "source")
    quantize_checkpoint(
        Job(tmp_path / "source", plan_of({".*": spec})), tmp_path / "out", note=notes.append
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert notes[-1] == line
    assert f"It {line}.\n" in card
    assert ('backend="torch"' in card) == ("torch" in line)


def test_nothing_but_the_linears_in_layers_is_said_to_be_quantized(sources, tmp_path):
    """Other tools look up OPT-350m's projections, too, which are linears and are not."""
    for plan in (plan_of(4), plan_of("8:tc-li")):
        target = tmp_path / plan.text
        quantize(sources("opt-350m"), target, plan)
        config = json.loads((target / "config.json").read_text())
        found = parse(config["quantization_config"], "config.json")
        assert found.find("model.decoder.layers.0.fc1") is not None
        assert found.find(LM_HEAD) is None
        assert found.find("model.decoder.project_in") is None
        assert found.find("model.decoder.project_out") is None


# ---- heads


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", ["opt", "opt untied", "opt-350m", "bloom"])
def test_a_head_leaves_the_embedding_as_it_is(name, algorithm, sources, tmp_path):
    source = sources(name, torch.float16)
    quantize(source, tmp_path / "out", plan_of(4, "3", algorithm=algorithm), samples=samples())
    ours, exact = load(tmp_path / "out"), load(source)
    assert torch.equal(ours.embed.weight, exact.embed.weight)
    assert ours.lm_head.spec.bits == 3
    assert not ours.config.tied_head
    error = relative(ours.lm_head.dequantize() - exact.lm_head.weight, exact.lm_head.weight)
    assert 0.01 < error < 0.5


def test_a_head_alone(sources, tmp_path):
    source = sources("llama", torch.float16)
    for algorithm in ("rtn", "gptq"):
        target = tmp_path / algorithm
        plan = plan_of({"lm_head": {"bits": 4, "algorithm": algorithm}})
        reports = quantize(source, target, plan, samples=samples())
        assert [entry.name for entry in reports] == ["lm_head"]
        before, after = tensors_of(source), tensors_of(target)
        rest = [name for name in before if name != "lm_head.weight"]
        assert all(torch.equal(before[name], after[name]) for name in rest)
        assert load(target).lm_head.spec.bits == 4


# ---- what cannot be


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (plan_of(16), "every layer stays at 16 bits"),
        (plan_of(4, algorithm="gptq"), "gptq needs calibration text"),
        (plan_of(4, algorithm="awq"), "awq needs calibration text"),
        (plan_of("8:tc"), "8:tc needs calibration text"),
        (plan_of({"mlp": 4, "fc3": 4}), "'fc3' matches no layer"),
        (plan_of("4,4,4"), "names 3 layers, the model has 2"),
    ],
)
def test_plans_that_are_refused(plan, words, sources, tmp_path):
    with pytest.raises(UserError, match=words):
        quantize(sources("opt"), tmp_path / "out", plan)
    assert not list(tmp_path.iterdir())


def test_a_quantized_source_is_refused(sources, tmp_path):
    quantize(sources("opt"), tmp_path / "out", plan_of(4))
    with pytest.raises(UserError, match="is quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", plan_of(4))
    with pytest.raises(UserError, match=r"is quantized already, and runs as it is"):
        load_model(tmp_path / "out", QuantPlan.parse("4"))
    with pytest.raises(UserError, match="is quantized; conversion takes 16-bit checkpoints"):
        convert(ModelFolder(tmp_path / "out", "out"), tmp_path / "c", overwrite=False)


def scaled(source: Path, folder: Path, **factors: float) -> Path:
    """A copy with the tensors whose names end so larger."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    for name in state:
        for end, factor in factors.items():
            if name.endswith(end.replace("_", ".")):
                state[name] = state[name] * factor
    FORMS["safetensors"](folder, state)
    return folder


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1e30, r"not finite in calibration|leave the range"),
        (1e19, r"not finite in calibration|leave the range|beyond"),
    ],
)
def test_activations_that_overflow(factor, words, algorithm, sources, tmp_path):
    """1e30 is infinite when it is squared in an MLP, 1e19 when the products are summed."""
    source = scaled(sources("opt"), tmp_path / "source", fc1_weight=factor)
    with pytest.raises(UserError, match=words):
        quantize(source, tmp_path / "out", plan_of(4, algorithm=algorithm), samples=samples())


def test_activations_that_float16_cannot_hold(sources, tmp_path):
    source = scaled(sources("opt"), tmp_path / "source", fc2_weight=1e6)
    plan = plan_of(4, algorithm="gptq")
    with pytest.raises(UserError, match="leave the range of float16; use --dtype bfloat16"):
        quantize(source, tmp_path / "a", plan, samples=samples(), dtype=torch.float16)
    quantize(source, tmp_path / "b", plan, samples=samples(), dtype=torch.bfloat16)
    assert load(tmp_path / "b").prefill(PROMPTS).isfinite().all()
