"""What is saved is what loading makes, from every form of source."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import FORMS
from conftest import FAMILIES, tiny
from covering import each, slow_but
from killing import contents
from quantizer_cases import (
    LAYOUTS,
    PROMPTS,
    SMALL,
    assert_same_tensors,
    plan_of,
    quantize,
    tensors_of,
)
from quantizing import MODELS, samples
from safetensors.torch import load_file

from qllm.checkpoint.convert import convert
from qllm.checkpoint.load import load_model
from qllm.config import QuantPlan
from qllm.hub import ModelFolder

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.covering(1)
@pytest.mark.parametrize("algorithm", ["rtn", "awq"])
@pytest.mark.parametrize("name", [*LAYOUTS, "gpt_neox", "glm4"])
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
