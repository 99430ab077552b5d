"""What a checkpoint records of its making, and the 16-bit one that is found by it."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoints import change_json
from conftest import tiny

from qllm import hub
from qllm.checkpoint.convert import convert
from qllm.checkpoint.origin import algorithm, base_model, find_reference, record
from qllm.checkpoint.reader import read_raw_config
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.hub import ModelFolder
from qllm.quant.algorithm import QuantizeOptions
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job


def quantize(source, target, origin, bits="2", **options):
    plan = QuantPlan.uniform(QuantSpec.parse(bits))
    quantize_checkpoint(Job(source, plan, origin=origin, **options), target)
    return ModelFolder(target, target.name)


def test_a_model_is_found_again_by_its_origin(tmp_path, monkeypatch):
    shutil.copytree(tiny("opt"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    models = [hub.find("opt-tiny"), hub.find("mine"), hub.find(str(tiny("llama")))]
    found = [(model.origin, model.path.resolve()) for model in models]
    monkeypatch.chdir("/")
    for origin, path in found:
        assert hub.find(origin).path.samefile(path)
    assert models[0].origin == "opt-tiny"
    assert ModelFolder(tmp_path, "facebook/opt-125m").origin == "facebook/opt-125m"


def test_what_is_quantized_records_it(tmp_path):
    """Clipping counts; a converted copy hands on what it was converted from."""
    options = QuantizeOptions(clip=True)
    made = quantize(tiny("opt"), tmp_path / "q", "opt-tiny", options=options)
    assert algorithm(read_raw_config(made.path)) == "rtn, clipped"
    notes = []
    found = find_reference(made, note=notes.append)
    assert found.path.samefile(tiny("opt")) and "opt-tiny" in notes[0]
    assert find_reference(made, str(tiny("llama"))).path.samefile(tiny("llama"))
    convert(hub.find("opt-tiny"), tmp_path / "c", overwrite=False)
    again = quantize(tmp_path / "c", tmp_path / "q2", str(tmp_path / "c"), "8:tc-li", fake=True)
    for folder in (tmp_path / "c", again.path):
        assert base_model(folder) == "opt-tiny"
    assert algorithm(read_raw_config(again.path)) == "rtn"
    assert find_reference(hub.find("opt-tiny")) == hub.find("opt-tiny")


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nbase_model: facebook/opt-125m\n---\n", "facebook/opt-125m"),
        ("---\ntags:\n- a\nbase_model:\n- 'a/b'\nx: y\n---\n", "a/b"),
        ('---\nbase_model: ["a/b"]\n---\n', "a/b"),
        ("---\ntags: []\n---\nbase_model: a/b\n", None),
        ("base_model: a/b\n", None),
    ],
)
def test_others_say_it_in_the_model_card(card, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {}}))
    (tmp_path / "README.md").write_text(card)
    assert base_model(tmp_path) == expected


@pytest.mark.parametrize("value", [7, "", ["a"], "x" * 5000, "\0", "a" * 300, "/nowhere"])
def test_a_record_that_leads_nowhere_is_one_line(value, tmp_path):
    shutil.copytree(tiny("opt"), tmp_path / "q")
    quantization = {"quant_method": "gptq", "bits": 4}
    change_json(tmp_path / "q/config.json", quantization_config=quantization, qllm_base_model=value)
    with pytest.raises(UserError, match="`reference`"):
        find_reference(ModelFolder(tmp_path / "q", "q"))
    assert algorithm(read_raw_config(tmp_path / "q")) == "gptq"


def test_a_path_that_json_cannot_say_is_not_recorded():
    assert record("/a\udcff", ["rtn"]) == {"qllm_algorithm": "rtn"}
    assert record(None, ()) == {}
