"""Where a model's ONNX files may lie, and how one of them is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qllm import LLM, hub, quantize
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from qllm.onnx.graph import MODEL  # noqa: E402
from qllm.onnx.model import read_model  # noqa: E402
from qllm.onnx.quantize import OnnxJob, quantize_onnx  # noqa: E402


@pytest.fixture
def apart(onnx_of_opt, tmp_path):
    """A folder as Hubs have them, whose models are in a folder of their own; and logits of one."""
    shutil.copytree(onnx_of_opt, tmp_path / "m")
    place = tmp_path / "m" / "onnx"
    place.mkdir()
    for path in (tmp_path / "m").glob(f"{MODEL}*"):
        path.rename(place / path.name)
    shutil.copytree(onnx_of_opt, tmp_path / "whole")
    quantize_onnx(
        OnnxJob(onnx_of_opt, QuantPlan.uniform(QuantSpec.parse("4", 32))), tmp_path / "q4"
    )
    return tmp_path / "m", tmp_path


def logits_of(name) -> torch.Tensor:
    return LLM.from_pretrained(str(name)).logits([[5, 6, 7]])[0]


def rename(model: Path, name: str) -> None:
    """Give a model another name, and leave its data that of all."""
    found = read_model(model)
    for tensor in found.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{name}_data"
    (model.parent / f"{MODEL}_data").rename(model.parent / f"{name}_data")
    model.unlink()
    onnx.save(found, model.parent / name)


def test_models_in_a_folder_of_their_own_are_found(apart, monkeypatch):
    folder, beside = apart
    want = logits_of(beside / "whole")
    for name in (folder, folder / "onnx", folder / "onnx" / MODEL):
        assert torch.equal(logits_of(name), want)
    monkeypatch.chdir(folder / "onnx")
    for name in (".", MODEL):
        assert torch.equal(logits_of(name), want)
    assert hub.resolve("opt", path=MODEL).name == "m"


def test_of_several_models_one_is_named(apart):
    folder, beside = apart
    rename(folder / "onnx" / MODEL, "model_fp16.onnx")
    for path in (beside / "q4").glob(f"{MODEL}*"):
        shutil.copy(path, folder / "onnx")
    want = logits_of(beside / "q4")
    assert torch.equal(logits_of(folder), want)  # model.onnx before all others
    rename(folder / "onnx" / MODEL, "model_q4.onnx")
    for name in ("model_q4", "model_fp16"):
        found = hub.find(str(folder / "onnx" / f"{name}.onnx"))
        assert found.holds_onnx and found.name == f"m-{name}"
    assert torch.equal(logits_of(folder / "onnx" / "model_q4.onnx"), want)
    with pytest.raises(UserError, match=r"model_fp16\.onnx, model_q4\.onnx\); name one of them"):
        LLM.from_pretrained(str(folder))
    # With a checkpoint beside them the folder is that, and the file is what it was.
    (folder / "model.safetensors").write_bytes(b"")
    assert not hub.find(str(folder)).holds_onnx
    quantize(folder / "onnx" / "model_fp16.onnx", 4, group_size=32, save=beside / "again")
    names = {path.name for path in (beside / "again").iterdir()}
    assert names == {path.name for path in (beside / "q4").iterdir()}
    assert torch.equal(logits_of(beside / "again"), want)


def test_what_takes_a_checkpoint_says_that_this_is_none(apart):
    with pytest.raises(UserError, match="holds an ONNX model, and no checkpoint"):
        quantize_checkpoint(Job(apart[0], QuantPlan.parse("4")), apart[1] / "out")
