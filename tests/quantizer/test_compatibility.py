"""What a saved model says of itself, and which tools load it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FAMILIES
from covering import each, slow_but
from foreign import twin_of
from oracle import IS_OLDER, assert_logits_close, draw_prompts, load, prefill_logits
from quantizer_cases import plan_of, quantize
from quantizing import samples, saved
from transformers import AutoModelForCausalLM

from qllm.checkpoint.formats import parse
from qllm.config import LM_HEAD
from qllm.quant.algorithm import GPTQOptions, QuantizeOptions
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread")


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
    if not loads and IS_OLDER:
        pytest.skip("transformers loaded some of these before 5.23")
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


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_groups_by_importance_are_said_to_be_refused(algorithm, tmp_path):
    """compressed-tensors 0.20 refuses them; to nearest, there are none whatever GPTQ's options."""
    notes: list[str] = []
    twin_of("llama").save_pretrained(tmp_path / "source")
    job = Job(
        tmp_path / "source",
        plan_of(4, group_size=16, algorithm=algorithm),
        QuantizeOptions(gptq=GPTQOptions(static_groups=False)),
        samples=draw_prompts([16] * 4, 96),
        compressed=True,
    )
    quantize_checkpoint(job, tmp_path / "out", note=notes.append)
    assert ("not in transformers: " in notes[-1]) == (algorithm == "gptq")
    if algorithm == "gptq":
        with pytest.raises(ValueError, match="actorder"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("compressed", [True, False])
def test_conv1d_is_not_said_to_load_in_transformers(compressed, tmp_path):
    """It loads GPT-2's integers into no layer of compressed-tensors, and says nothing; with
    GPTQModel 7.7.0 its initialization was seen to fail."""
    notes: list[str] = []
    job = Job(saved("gpt2", tmp_path / "source"), plan_of(4, group_size=-1), compressed=compressed)
    quantize_checkpoint(job, tmp_path / "out", note=notes.append)
    assert "not in transformers: " in notes[-1] and "Conv1D" in notes[-1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM" not in card and "library_name: qllm" in card


SYM4 = {".*": {"bits": 4, "group_size": 32, "scheme": "sym"}}


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        (
            SYM4,
            "loads in QLLM, transformers (with optimum gptqmodel), vLLM",
        ),
        (
            {".*": {"bits": 4, "group_size": 32}},
            "loads in QLLM, transformers (with optimum gptqmodel); not in vLLM: it takes GPTQ of 4 "
            "and 8 bits, with `scheme` sym",
        ),
        (
            {".*": {"bits": 8, "group_size": 24, "scheme": "sym"}},
            'loads in QLLM, transformers (with optimum gptqmodel and its backend "torch"); not in '
            "vLLM: groups of 24 do not divide the 64 inputs of layers.0.attention.qkv, as groups "
            "of 8 would",
        ),
        (
            SYM4 | {"layers.0.": 16},
            "loads in QLLM, vLLM; not in transformers: optimum takes all layers for those of the "
            "first spec, as GPTQModel.load does not",
        ),
        (
            SYM4 | {"mlp": {"bits": 8, "scheme": "sym"}},
            "loads in QLLM, vLLM; not in transformers: optimum takes all layers for those of the "
            "first spec, as GPTQModel.load does not",
        ),
        (
            SYM4 | {"lm_head": {"bits": 4, "group_size": 32, "scheme": "sym"}},
            "loads in QLLM, vLLM; not in transformers: optimum draws a packed head at random, as "
            "GPTQModel.load does not",
        ),
    ],
)
def test_where_gptq_loads(rules, line, tmp_path):
    """As was seen with optimum 2.3.0 and GPTQModel 7.7.0 on a CPU, which load the third with that
    backend alone; the first two of Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3 and GPT-NeoX, too.
    """
    notes: list[str] = []
    twin_of("llama").save_pretrained(tmp_path / "source")
    quantize_checkpoint(
        Job(tmp_path / "source", plan_of(rules)), tmp_path / "out", note=notes.append
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
        assert "transformers (with" in (target / "README.md").read_text()
        config = json.loads((target / "config.json").read_text())
        found = parse(config["quantization_config"], "config.json")
        assert found.find("model.decoder.layers.0.fc1") is not None
        assert found.find(LM_HEAD) is None
        assert found.find("model.decoder.project_in") is None
        assert found.find("model.decoder.project_out") is None


def test_all_that_keeps_a_packed_embedding_from_loading_is_said(tmp_path):
    notes: list[str] = []
    twin_of("llama").save_pretrained(tmp_path / "source")
    plan = plan_of({".*": {"bits": 4, "group_size": 24}, "embed": 8})
    quantize_checkpoint(Job(tmp_path / "source", plan), tmp_path / "out", note=notes.append)
    for name in ("transformers: ", "vLLM: "):
        reason = notes[-1].partition(f"not in {name}")[2].partition("; ")[0]
        assert "groups of 24 do not divide" in reason and ", and " in reason
        assert "packed embeddings" in reason
