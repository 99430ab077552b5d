"""What the scripts make of a quantized checkpoint, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import change_json
from conftest import assert_user_error, tiny
from inside import call
from killing import contents
from safetensors.torch import load_file, save_file
from shallow_models import CONVERT, GEN, QUANT, REF, shallow

# ---- what the other scripts make of a quantized checkpoint


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> Path:
    return shallow("opt", tmp_path_factory.mktemp("source") / "opt-shallow")


@pytest.fixture(scope="module")
def saved(opt, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("saved") / "out"
    done = call(QUANT, "--model-path", opt, "--bitwidth", "4", "--save", target)
    assert done.returncode == 0, done.stderr
    return target


def changed_tensors(saved: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a quantized checkpoint with other tensors."""
    folder.mkdir()
    for path in saved.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FC1 = "model.decoder.layers.1.fc1."


def test_a_quantized_checkpoint_runs_as_it_is(saved, opt, tmp_path):
    for args in (("--bitwidth", "4"), ("--bitwidth", "16"), ("--lm-head-bits", "4")):
        done = call(GEN, "--model-path", saved, *args)
        assert_user_error(done, "is quantized already, and runs as it is", args[0])
    quantized = "this checkpoint is quantized, the reference is the 16-bit one"
    assert_user_error(call(REF, "--model-path", saved), quantized)
    again = ("--compare", "--reference", saved)
    assert_user_error(call(GEN, "--model-path", saved, *again), quantized)
    done = call(CONVERT, "--model-path", saved, "--save", tmp_path / "converted")
    assert_user_error(done, "is quantized; conversion takes 16-bit checkpoints")
    done = call(QUANT, "--model-path", saved, "--save", tmp_path / "again")
    assert_user_error(done, "is quantized already; give the 16-bit checkpoint")
    assert not list(tmp_path.iterdir())


def without(name: str) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        del state[FC1 + name]

    return change


def cut(name: str, *size: int) -> Callable[[dict], None]:
    """A tensor with fewer rows or columns."""

    def change(state: dict) -> None:
        tensor = state[FC1 + name]
        state[FC1 + name] = tensor[tuple(slice(n) for n in size)].clone()

    return change


def of_type(name: str, dtype: torch.dtype) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        state[FC1 + name] = state[FC1 + name].to(dtype)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("qweight"), ("lacks", f"{FC1}qweight", "quantization_config")),
        (without("scales"), ("lacks", f"{FC1}scales")),
        (without("bias"), ("lacks", f"{FC1}bias")),
        (cut("qweight", 31), ("model.safetensors", f"{FC1}qweight")),
        (cut("qweight", 32, 1000), ("model.safetensors", f"{FC1}qweight")),
        (cut("scales", 1), ("model.safetensors", f"{FC1}scales")),
        (cut("g_idx", 200), ("model.safetensors", f"{FC1}g_idx")),
        (of_type("qweight", torch.int64), ("model.safetensors", f"{FC1}qweight")),
        (of_type("scales", torch.float64), ("model.safetensors", f"{FC1}scales")),
    ],
)
def test_tensors_that_are_not_what_the_config_says(change, words, saved, tmp_path):
    broken = changed_tensors(saved, tmp_path / "broken", change)
    assert_user_error(call(GEN, "--model-path", broken), *words)


def test_a_quantized_checkpoint_that_is_cut_off(saved, tmp_path):
    broken = changed_tensors(saved, tmp_path / "broken", lambda state: None)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-1000])
    assert_user_error(call(GEN, "--model-path", broken), "not a whole safetensors file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"quant_method": "awful"},
            ('"awful"', "auto-round, awq, bitnet"),
        ),
        ({"bits": 5}, ("bits 5",)),
        ({"bits": 8}, ("qweight",)),
        ({"group_size": 64}, ("layers.0",)),
        ({"group_size": 0}, ("group_size",)),
    ],
)
def test_configs_that_are_not_what_the_tensors_are(changes, words, saved, tmp_path):
    broken = changed_tensors(saved, tmp_path / "broken", lambda state: None)
    config = json.loads((broken / "config.json").read_text())["quantization_config"]
    change_json(broken / "config.json", quantization_config={**config, **changes})
    assert_user_error(call(GEN, "--model-path", broken), *words)


def test_a_bundled_model_is_left_as_it_is(opt):
    before = contents(opt)
    assert_user_error(call(QUANT, "--model-path", opt, "--save", opt), "not empty")
    assert contents(opt) == before
    assert tiny("opt").exists()
