"""Calibration statistics: what they hold, the file they are kept in, and files that are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from qllm.calibration import FORMAT, Calibration, find_calibration
from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.hub import ModelFolder

OURS = {"format": FORMAT, "model": "a/b"}


def example() -> Calibration:
    return Calibration(
        {"layers.0.mlp.up": torch.tensor([1.0, 0.5])},
        {"layers.0.mlp.up": torch.tensor([2.0, 0.0, 3.0])},
        {"model": "a/b", "source": "text.txt"},
    )


def test_observe_keeps_the_largest_of_all_calls():
    calibration = Calibration()
    calibration.observe("a", torch.tensor([[1.0, -2.0], [0.5, 1.0]]), torch.tensor([[-7.0], [3.0]]))
    calibration.observe("a", torch.tensor([[-1.5, 0.0]]), torch.tensor([[1.0]]))
    calibration.observe("b", torch.tensor([[0.0]]), torch.tensor([[0.0, 4.0]]))
    assert {name: value.tolist() for name, value in calibration.inputs.items()} == {
        "a": [1.5, 2.0],
        "b": [0.0],
    }
    assert {name: value.tolist() for name, value in calibration.outputs.items()} == {
        "a": [7.0],
        "b": [0.0, 4.0],
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_observe_holds_float32(dtype):
    calibration = Calibration()
    calibration.observe("a", torch.full((2, 3), -0.3, dtype=dtype), torch.ones(2, 1, dtype=dtype))
    assert calibration.inputs["a"].dtype == torch.float32
    assert calibration.inputs["a"].tolist() == [torch.tensor(0.3, dtype=dtype).item()] * 3


def test_save_and_load(tmp_path):
    path, saved = tmp_path / "x.safetensors", example()
    saved.save(path)
    assert set(load_file(path)) == {"layers.0.mlp.up.input", "layers.0.mlp.up.output"}
    loaded = Calibration.load(path)
    assert loaded.about == saved.about
    for side in ("inputs", "outputs"):
        got, expected = getattr(loaded, side), getattr(saved, side)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("name", "said"), [("a/b", 1), ("other", 2)])
def test_statistics_of_another_model_are_named(name, said, tmp_path):
    path, notes = tmp_path / "x.safetensors", []
    example().save(path)
    plan = QuantPlan.uniform(QuantSpec.parse("8:tc-li"))
    assert find_calibration(path, ModelFolder(tmp_path, name), plan, notes.append) is not None
    assert notes[1:] == ["they are those of a/b, and this is other"][: said - 1]


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"a.input": torch.ones(2)}, None, "is no calibration; fake_calib_gen.py makes one"),
        ({"a.input": torch.ones(2)}, {"format": "pt"}, "is no calibration"),
        ({"a.other": torch.ones(2)}, OURS, "cannot be read as a calibration"),
        ({"a.input": torch.tensor([1.0, float("nan")])}, OURS, "not all finite"),
        ({"a.input": torch.tensor([1.0, float("inf")])}, OURS, "not all finite"),
        ({"a.input": torch.tensor([1.0, -1.0])}, OURS, "not all finite"),
        ({"a.output": torch.tensor([float("nan")])}, OURS, "not all finite"),
        ({"a.input": torch.tensor(1.0)}, OURS, "not a float32 vector"),
        ({"a.input": torch.ones(2, 2)}, OURS, "not a float32 vector"),
        ({"a.input": torch.ones(2).half()}, OURS, "not a float32 vector"),
        ({"a.input": torch.ones(2).to(torch.float8_e4m3fn)}, OURS, "not a float32 vector"),
    ],
)
def test_files_that_are_refused(tmp_path, tensors, metadata, words):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=words) as error:
        Calibration.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, None])
def test_files_that_are_no_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a calibration"):
        Calibration.load(path)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "x.safetensors"
    example().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read as a calibration"):
        Calibration.load(path)


def test_check_takes_its_own_model():
    calibration = example()
    calibration.inputs["lm_head"] = torch.ones(5)  # more than is asked for does not matter
    calibration.check({"layers.0.mlp.up": (3, 2)})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"layers.0.mlp.up": (3, 4)}, ("2 channels", "takes 4", "a/b")),
        ({"layers.0.mlp.up": (3, 2), "layers.1.mlp.up": (3, 2)}, ("nothing", "layers.1.mlp.up")),
    ],
)
def test_check_refuses_another_model(shapes, words):
    with pytest.raises(UserError, match="of another model") as error:
        example().check(shapes)
    for word in words:
        assert word in str(error.value)
