"""The text models inside multimodal ones: what transformers' own classes make of text alone."""

from __future__ import annotations

import json

import pytest
import torch
from multimodal import VOCABULARY, configs
from oracle import (
    assert_logits_close,
    assert_same_model,
    draw_prompts,
    load,
    prefill_logits,
    random_model,
    save,
)
from safetensors.torch import save_file

from qllm.huggingface import HuggingFaceModel
from qllm.models.multimodal import MULTIMODAL

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = configs()
PROMPTS = draw_prompts((9, 3, 14, 1), VOCABULARY - 4)
# Those that others show as well.
SLOW = ("llava of qwen2", "llava_next", "smolvlm", "qwen2_vl")


def test_there_is_a_model_of_each_type():
    assert {config.model_type for config in CONFIGS.values()} == set(MULTIMODAL)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONFIGS]
)
def test_text_is_what_transformers_makes_of_it(name, tmp_path):
    theirs, notes = random_model(CONFIGS[name]), []
    ours = save(theirs, tmp_path / "as saved")
    assert_same_model(ours, theirs, PROMPTS, 8)
    cache = ours.new_cache(1, 20)
    ours.prefill([PROMPTS[1]], cache)
    ours.decode(torch.tensor([1]), cache)
    assert cache.captured.graph_break is None
    reference = HuggingFaceModel.load(tmp_path / "as saved", dtype=torch.float32)
    found = reference.logits(reference.hidden(PROMPTS))
    assert_logits_close(found, prefill_logits(theirs, PROMPTS))
    assert len(reference.layers()) == 2
    assert reference.nbytes < 1.01 * sum(buffer.nbytes for buffer in ours.buffers())
    # As the model has its tensors in memory, which is what many files have.
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if ours.config.tied_head:
        del state["lm_head.weight"]
    folder = tmp_path / "as in memory"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_bytes((tmp_path / "as saved" / "config.json").read_bytes())
    again = load(folder, note=notes.append)
    assert torch.equal(again.prefill(PROMPTS), ours.prefill(PROMPTS))
    (note,) = notes
    assert f"is a {theirs.config.model_type}: its text model alone is used" in note


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_settings_that_old_files_have_at_the_top(name, tmp_path):
    theirs = random_model(CONFIGS[name])
    save(theirs, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    text = values.pop("text_config") | {"model_type": name, "rope_theta": 1e4}
    del text["rope_parameters"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    path.write_text(json.dumps(values | text))
    theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_model(load(tmp_path), theirs, PROMPTS, 4)
