"""Mixtures of experts: what cannot be, or is not known yet, is one line, and what a step reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracle import load, random_model
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from qllm.bench.ranks import predict
from qllm.bench.runners import ModelRunner, multiplied, read_bytes
from qllm.calibration import calibrate
from qllm.checkpoint.load import elements, module_bytes
from qllm.config import QuantPlan
from qllm.errors import UserError
from qllm.onnx.export import export
from qllm.report import bitwidth, kernel_rows

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
SIZES |= {"intermediate_size": 24, "num_key_value_heads": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=6),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=20, head_dim=8),
    "olmoe": OlmoeConfig(**SIZES, num_experts=6, pad_token_id=None),
}


def made(family: str, folder: Path, **changes: Any) -> Path:
    """A random model, of whose config.json some settings are changed."""
    random_model(CONFIGS[family]).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# A family, settings that take the place of its own, and what is said of them.
REFUSED = {
    "more experts than there are": (
        "mixtral",
        {"num_local_experts": 7},
        r"moe\.gate\.weight has the shape \[6, 32\], config\.json implies \[7, 32\]",
    ),
    "experts without number": (
        "mixtral",
        {"num_local_experts": 4096},
        r"holds \d+ tensors, its config.json implies 2 layers of 4096 experts",
    ),
    "beyond any": ("mixtral", {"num_local_experts": 2**31}, "a whole number from 1 to 4096"),
    "fewer than there are": (
        "mixtral",
        {"num_local_experts": 5},
        r"the shape \[6, 32\], config\.json implies \[5",
    ),
    "a token takes more": ("mixtral", {"num_experts_per_tok": 7}, "a whole number from 1 to 6"),
    "another size": (
        "qwen3_moe",
        {"moe_intermediate_size": 21},
        r"has the shape \[20, 32\], config.json implies \[21, 32\]",
    ),
    "layers that are no list": ("qwen3_moe", {"mlp_only_layers": "1"}, "a list of layers"),
    "a layer without experts": (
        "qwen3_moe",
        {"mlp_only_layers": [1]},
        r"lacks model\.layers\.1\.mlp\.gate_proj\.weight",
    ),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0; expected null"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(case, tmp_path):
    family, changes, said = REFUSED[case]
    with pytest.raises(UserError, match=said):
        load(made(family, tmp_path, **changes))


def test_ranges_that_are_not_known_are_not_made_up(tmp_path):
    folder = made("mixtral", tmp_path)
    calibration = calibrate(load(folder), [[3]])  # a token, which takes two experts of six
    with pytest.raises(UserError, match=r"reached layers\.0\.mlp\.experts\.\d\.up: the range"):
        load(folder, "8:tc", calibration=calibration)
    load(folder, "8:tc-li", calibration=calibration)


def test_what_does_not_know_experts_says_so(tmp_path):
    folder = made("mixtral", tmp_path)
    config = load(folder).config
    calls = (
        lambda: export(folder, tmp_path / "onnx"),
        lambda: predict(folder, [QuantPlan.parse("4")], config, None),
    )
    for call in calls:
        with pytest.raises(UserError, match=r"mixtures? of experts"):
            call()


def test_a_step_reads_the_experts_that_a_token_takes(tmp_path):
    model = load(made("qwen3_moe", tmp_path))
    experts = [layer.mlp.experts for layer in model.layers]
    idle = sum(map(module_bytes, experts)) * 4 // 6
    assert read_bytes(model) == module_bytes(model) - module_bytes(model.embed) - idle
    assert multiplied(model) == elements(model.layers) - sum(map(elements, experts)) * 4 // 6
    runner = ModelRunner.of_decoder(model)
    assert runner.read_bytes(1) == read_bytes(model)
    assert runner.read_bytes(2) is None  # which experts two tokens take together is theirs to say


def test_equal_experts_share_a_row(tmp_path):
    plan = QuantPlan.from_json({".*": 4, r"\.experts\.2\.": 8})
    model = load(made("mixtral", tmp_path), plan=plan)
    assert bitwidth(model) == "4,8"
    rows = {row["layer"]: row["format"] for row in kernel_rows(model)}
    assert rows["layers.{0-1}.mlp.experts.{2}.up"] == "8 bits, group 128, asym"
    assert rows["layers.{0-1}.mlp.experts.{0-1, 3-5}.up"] == "4 bits, group 128, asym"
    assert rows["layers.{0-1}.mlp.router"] == "16 bits"
