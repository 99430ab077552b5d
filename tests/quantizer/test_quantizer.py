"""Every algorithm on every kind of model: saved, loaded, and read by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import FORMS
from covering import each, slow_but
from oracle import load
from quantizer_cases import (
    PROMPTS,
    SMALL,
    assert_saved_and_fake_agree,
    plan_of,
    quantize,
    relative,
    tensors_of,
)
from quantizing import MODELS, STACKED, samples
from safetensors.torch import load_file

from qllm.checkpoint.convert import convert
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.hub import ModelFolder
from qllm.layers.fp16 import DenseLinear
from qllm.models import FAMILIES as MODEL_FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

ALGORITHMS = ("rtn", "gptq", "awq")
READ_BY_OTHERS = [name for name in MODELS if name not in STACKED]


@pytest.mark.parametrize(
    ("name", "algorithm"),
    slow_but(each(READ_BY_OTHERS, ALGORITHMS), READ_BY_OTHERS, ALGORITHMS),
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
    linears = MODEL_FAMILIES[ours.config.family].layer_linears(ours.config)
    assert len(scales) == (len(linears) if bitwidth == "8:tc" else 0)
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


@pytest.mark.covering(1)
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
    with pytest.raises(UserError, match="leave the range of float16; use `dtype` bfloat16"):
        quantize(source, tmp_path / "a", plan, samples=samples(), dtype=torch.float16)
    quantize(source, tmp_path / "b", plan, samples=samples(), dtype=torch.bfloat16)
    assert load(tmp_path / "b").prefill(PROMPTS).isfinite().all()
