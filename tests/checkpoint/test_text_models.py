"""Checkpoints of multimodal models, of which the text model alone is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import Folder, awq, compressed, folder_of, gptq
from foreign_cases import AWQ, GPTQ, ct
from foreign_changes import of_several_bits
from foreign_floats import BITS4, FP8, bitsandbytes, fp8
from multimodal import put_inside
from oracle import assert_same_model, draw_prompts, load, prefill_logits
from transformers import AutoModelForCausalLM

from qllm.checkpoint.reader import read_raw_config
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.generation_config import read_generation_config
from qllm.models import read_config
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = draw_prompts((9, 3), 96)
OLD = ("language_model.model.", "language_model.lm_head.")
NEW = ("model.language_model.", "lm_head.")
TEXT = {
    **{"model_type": "llama", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
}


def two_widths(prefix: str) -> Callable[[Folder], None]:
    """A rule of one layer's, under the name that it has with all that is around it."""

    def change(folder: Folder) -> None:
        groups = folder.config["quantization_config"]["config_groups"]
        own = json.loads(json.dumps(groups["group_0"]))
        groups["group_0"]["targets"] = [rf"re:{re.escape(prefix)}layers\.[01]\..*proj$"]
        own["targets"], own["weights"]["num_bits"] = ["Linear"], 3
        groups["group_1"] = own
        folder.config["quantization_config"]["ignore"] = [
            *("re:.*lm_head", "re:vision_tower.*", "multi_modal_projector.linear_1"),
        ]

    return change


def mlx_rules(folder: Folder) -> None:
    """Settings of single modules, and of the vision tower, which is as it was."""
    of_several_bits(folder)
    for key in ("quantization", "quantization_config"):
        entry = {name.replace("model.", OLD[0], 1): v for name, v in folder.config[key].items()}
        folder.config[key] = entry | {"vision_tower.layers.0": False}


NOT_SEEN = {"modules_to_not_convert": ["vision_tower", "multi_modal_projector", "lm_head"]}
QUANTIZED = {
    "GPTQ": (gptq(), GPTQ, "mistral3", OLD, None),
    "AWQ": (awq(), AWQ | NOT_SEEN, "llava", NEW, None),
    "compressed-tensors": (
        compressed(4, 32, sym=False),
        ct(4, 32, sym=False),
        *("mistral3", NEW, two_widths(NEW[0])),
    ),
    "compressed-tensors, old names": (
        compressed(4, 32, sym=False),
        ct(4, 32, sym=False),
        *("llava", OLD, two_widths(OLD[0])),
    ),
    "FP8": (
        fp8((0, 0), as_type=torch.bfloat16, shape=lambda rows, columns: ()),
        FP8 | {"activation_scheme": "static"} | NOT_SEEN,
        *("mistral3", OLD, None),
    ),
    "NF4": (
        bitsandbytes(),
        BITS4 | {"llm_int8_skip_modules": ["vision_tower"]},
        "llava",
        OLD,
        None,
    ),
    "MLX": (None, None, "mistral3", OLD, mlx_rules),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_text_model_that_others_quantized(name, tmp_path):
    write, config, outer, names, change = QUANTIZED[name]
    folder = folder_of("llama", write, config)
    if change is not None:
        change(folder)
    put_inside(folder, outer, *names)
    folder.write(tmp_path)
    assert_same_model(load(tmp_path), folder.twin, PROMPTS, 4, 1e-4)


def text_in(tmp_path: Path, outer: str = "llava", **settings: object) -> Path:
    folder = folder_of("llama", None, None)
    put_inside(folder, outer, **settings)
    folder.write(tmp_path)
    return tmp_path


def test_what_is_saved_is_the_text_model_by_itself(tmp_path):
    source, notes = text_in(tmp_path / "source"), []
    (source / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    (source / "preprocessor_config.json").write_text("{}")
    plan = QuantPlan.uniform(QuantSpec.parse("4", 32))
    quantize_checkpoint(Job(source, plan, fake=True), tmp_path / "saved", note=notes.append)
    assert "what is written is the text model of the llava alone, a llama" in notes
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert not {"vision_config", "text_config"} & values.keys()
    assert (tmp_path / "saved" / "chat_template.json").exists()
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ours = load(tmp_path / "saved").prefill(PROMPTS, last=False)
    assert torch.allclose(ours, prefill_logits(theirs.eval(), PROMPTS), atol=1e-3)
    rounded = load(source, plan=plan).prefill(PROMPTS, last=False)
    assert torch.allclose(ours, rounded, atol=1e-3)


@pytest.mark.parametrize(
    ("outer", "above", "inside", "tied"),
    [
        ("mistral3", {}, {"tie_word_embeddings": False}, True),
        ("mistral3", {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, False),
        ("llava_next", {}, {"tie_word_embeddings": True}, False),
        ("llava", {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, True),
        ("llava", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, True),
        ("llava", {}, {}, False),
    ],
)
def test_whose_word_counts_on_the_head(outer, above, inside, tied, tmp_path):
    from transformers import AutoConfig

    values = {"model_type": outer, "text_config": TEXT | inside, **above}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(read_raw_config(tmp_path)).tied_head is tied
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is tied


def test_other_settings_that_both_have(tmp_path):
    inner = {"eos_token_id": 7, "dtype": "float16", "repetition_penalty": 1.5, "max_length": 9}
    values = {"model_type": "llava", "text_config": TEXT | inner, "max_length": 30}
    path = tmp_path / "config.json"
    for above, eos, dtype in (
        ({"eos_token_id": [3, 4], "torch_dtype": "bfloat16"}, (3, 4), "bfloat16"),
        ({"eos_token_id": None}, (7,), None),
    ):
        path.write_text(json.dumps(values | above))
        config = read_config(read_raw_config(tmp_path))
        generation = read_generation_config(tmp_path, config)
        assert config.eos_token_ids == generation.eos_token_ids == eos
        assert config.dtype == dtype
        assert (generation.max_length, generation.repetition_penalty) == (30, 1.5)
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(values | {"text_config": TEXT | quantized}))
    assert read_raw_config(tmp_path).values["quantization_config"]["bits"] == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": None}, "text_config is missing; expected an object"),
        ({"text_config": ["llama"]}, r"text_config is \['llama'\]; expected an object"),
        (
            {"text_config": {"model_type": "llava", "text_config": TEXT}},
            "model_type of its text_config is 'llava'; of the text models inside a mistral3, QLLM",
        ),
        ({"text_config": {"model_type": "deepseek_v3"}}, "is 'deepseek_v3'; of the text models"),
        ({"text_config": {"model_type": ["llama"]}}, r"text_config is \['llama'\]; of the text"),
        ({"text_config": TEXT | {"hidden_size": "64"}}, "hidden_size is '64'; expected a whole"),
        (
            {
                "text_config": TEXT
                | {"model_type": "gemma3_text", "use_bidirectional_attention": True}
            },
            "use_bidirectional_attention is True; expected false",
        ),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        (
            {"model_type": "paligemma"},
            "is 'paligemma'; .*, and the text model inside gemma3, gemma4, gemma4_u",
        ),
        ({"model_type": "llama"}, "has no tensor that begins with model.layers.0|lacks|implies"),
    ],
)
def test_what_cannot_be_read_is_one_line(changes, says, tmp_path):
    text_in(tmp_path, "mistral3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=says) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_of_tensors_are_those_of_the_file(tmp_path):
    folder = folder_of("llama", None, None)
    put_inside(folder, "mistral3", *OLD)
    whole = dict(folder.state)
    own = "language_model.model.layers.1.mlp.up_proj.weight"
    new = own.replace("language_model.model", "model.language_model")
    renamed = {key.replace(OLD[0], "text."): value for key, value in whole.items()}
    for state, says in (
        ({key: value for key, value in whole.items() if key != own}, "lacks .*layers.1.mlp.up_p"),
        (whole | {own: torch.zeros(3, 3)}, rf"{own} has the shape \[3, 3\]"),
        (whole | {own.replace("up", "x"): torch.zeros(3)}, "holds language_model.*x_proj.weight"),
        (whole | {new: whole[own]}, "holds model.language_model.*, as model.safetensors does"),
        (renamed, "no tensor that begins with model.language_model.layers.0"),
    ):
        folder.state = state
        folder.write(tmp_path)
        with pytest.raises(UserError, match=says):
            load(tmp_path)
