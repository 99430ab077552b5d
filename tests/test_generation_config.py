"""generation_config.json, as transformers reads it; prompts and settings that cannot be."""

from __future__ import annotations

import json

import pytest
from conftest import tiny
from generating import SMALL, VOCAB
from oracle import (
    assert_tokens_equal,
    draw_prompts,
    load,
    our_bundled,
    random_model,
    reference,
)
from transformers import (
    AutoModelForCausalLM,
)

from qllm.checkpoint.reader import read_raw_config
from qllm.errors import UserError
from qllm.generate import check_prompts, generate
from qllm.generation_config import NOT_APPLIED, GenerationConfig, read_generation_config
from qllm.models import read_config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers warns of lengths that contradict each other; here they are meant to.
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

# generation_config.json: what is in it, and what config.json says beside it.
FILES = {
    "none": (None, {"eos_token_id": "said"}),
    "none, and a list": (None, {"eos_token_id": ["said"]}),
    "empty": ({}, {"eos_token_id": "said"}),
    "one": ({"eos_token_id": "said"}, {"eos_token_id": 2}),
    "list": ({"eos_token_id": [58, "said"]}, {"eos_token_id": 2}),
    "null": ({"eos_token_id": None}, {"eos_token_id": "said"}),
    "no such token": ({"eos_token_id": [-1, 9999, "said"], "min_length": 20}, {}),
    "lengths": ({"eos_token_id": "said", "min_length": 20, "max_length": 30}, {}),
    "new tokens": ({"eos_token_id": "said", "min_new_tokens": 5, "max_new_tokens": 9}, {}),
    "penalty": ({"eos_token_id": "said", "repetition_penalty": 1.5, "pad_token_id": 4}, {}),
    "in config.json": (
        None,
        {"repetition_penalty": 1.5, "min_length": 14, "max_length": 21, "eos_token_id": ["said"]},
    ),
    "not in config.json": ({"max_new_tokens": 5}, {"repetition_penalty": 1.5, "max_length": 12}),
    "nothing said": ({"repetition_penalty": 1.0, "min_length": 0, "max_length": None}, {}),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("limit", [{}, {"max_new_tokens": 7}], ids=["own length", "7 tokens"])
@pytest.mark.parametrize("name", FILES)
def test_generation_config_is_read_as_transformers_reads_it(name, limit, tmp_path):
    theirs = random_model(SMALL["llama"], seed=3)
    prompts = draw_prompts([11, 4, 8], VOCAB, seed=5)
    said = reference(theirs, prompts).tokens[1][2]
    file, changes = json.loads(json.dumps(FILES[name]).replace('"said"', str(said)))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    path = tmp_path / "generation_config.json"
    path.unlink()
    if file is not None:
        path.write_text(json.dumps(file))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    want = reference(theirs, prompts, eos=None, **limit)
    notes = []
    config = read_generation_config(tmp_path, read_config(read_raw_config(tmp_path)), notes.append)
    config = GenerationConfig(**{**vars(config), **limit})
    assert_tokens_equal(generate(load(tmp_path), prompts, config), want)
    assert notes == []


@pytest.mark.parametrize("key", NOT_APPLIED)
def test_settings_that_are_not_applied_are_named(key, tmp_path):
    config = read_config(read_raw_config(tiny("opt")))
    path, notes = tmp_path / "generation_config.json", []
    for neutral in (None, NOT_APPLIED[key]):
        path.write_text(json.dumps({key: neutral}))
        read_generation_config(tmp_path, config, notes.append)
        assert notes == []
    path.write_text(json.dumps({key: 3}))
    read_generation_config(tmp_path, config, notes.append)
    assert notes == [f"generation_config.json sets {key}, which QLLM does not apply"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, None]}, "a token id or a list of them"),
        ({"max_length": -4}, "max_length is -4"),
        ({"min_new_tokens": 2.5}, "min_new_tokens is 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": "strong"}, "a positive number"),
    ],
)
def test_impossible_settings_are_refused(values, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_generation_config(tmp_path, read_config(read_raw_config(tiny("opt"))))


@pytest.mark.parametrize(
    ("prompts", "wishes", "message"),
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 4096]], {}, "prompt 1 has the token id 4096; the model's vocabulary ends at 4095"),
        ([[5], [-1]], {}, "prompt 2 has the token id -1"),
        ([[1] * 500], {"max_new_tokens": 13}, "500 tokens and 13 new ones exceed .* 512"),
        ([[1] * 9], {"max_length": 9}, "9 tokens leaves nothing to generate: max_length"),
    ],
)
@pytest.mark.parametrize("check", [check_prompts, generate])
def test_impossible_prompts_are_refused(check, prompts, wishes, message):
    model, config = our_bundled("llama"), GenerationConfig(**wishes)
    with pytest.raises(UserError, match=message):
        if check is generate:
            generate(model, prompts, config)
        else:
            check_prompts(model.config, prompts, config)
