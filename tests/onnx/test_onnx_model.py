"""ONNX models that cannot be: each is one line that says why, before onnxruntime sees it."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from checkpoints import LFS_POINTER, change_json
from conftest import tiny
from onnx import TensorProto, helper

from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.onnx.graph import DATA, MODEL
from qllm.onnx.quantize import OnnxJob, quantize_onnx
from qllm.onnx.runner import OnnxDecoder
from qllm.onnx_files import is_onnx


@pytest.fixture
def folder(onnx_of_opt, tmp_path):
    """A copy that may be broken."""
    return Path(shutil.copytree(onnx_of_opt, tmp_path / "model"))


def changed(change):
    """What changes the graph of a folder."""

    def make(folder: Path) -> None:
        model = onnx.load(folder / MODEL, load_external_data=False)
        change(model)
        (folder / MODEL).write_bytes(model.SerializeToString())

    return make


def external(key: str, value: str):
    """What changes where the data of the embedding lies."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "embed.weight")
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value

    return changed(change)


def opset(version: int):
    return changed(lambda model: setattr(model.opset_import[0], "version", version))


def drop(field: str, name: str):
    def change(model: onnx.ModelProto) -> None:
        values = getattr(model.graph, field)
        values.remove(next(value for value in values if value.name == name))

    return changed(change)


def cut(name: str, count: int = 1000):
    def make(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) - count])

    return make


def one_more_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(
        helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    )


def integer_past(model: onnx.ModelProto) -> None:
    next(
        v for v in model.graph.input if "past" in v.name
    ).type.tensor_type.elem_type = TensorProto.INT64


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "NoSuchOperator"


def unknown_domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "org.example"
    model.opset_import.add(domain="org.example", version=1)


def product_of_nothing(model: onnx.ModelProto) -> None:
    """The checker knows how many inputs an operator has only where it knows the domain."""
    model.opset_import.add(domain="org.example", version=1)
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.domain = "org.example"
    del node.input[:]


def no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 99


def holding(data: bytes):
    return lambda folder: (folder / MODEL).write_bytes(data)


@dataclass(frozen=True)
class Broken:
    words: str
    make: object


BROKEN = {
    "text": Broken("no whole ONNX model", holding(b"no model, but some text")),
    "an empty file": Broken("it has no graph", holding(b"")),
    "a pointer": Broken("Git LFS pointer", holding(LFS_POINTER)),
    "a truncated graph": Broken("no whole ONNX model|no valid ONNX model", cut(MODEL)),
    "truncated data": Broken(f"which {DATA} does not have", cut(DATA)),
    "no data": Broken(f"{DATA}, which .* lacks", lambda folder: (folder / DATA).unlink()),
    "data above": Broken("not a file of its own folder", external("location", f"../{DATA}")),
    "data elsewhere": Broken("not a file of its own folder", external("location", "/etc/passwd")),
    "data before the file": Broken("from -4096 on", external("offset", "-4096")),
    "data behind the file": Broken("does not have", external("offset", str(10**12))),
    "data of another length": Broken("takes .* bytes", external("length", "64")),
    "data nowhere": Broken("has no place", external("offset", "here")),
    "an old opset": Broken("has opset 9; .*13 and later", opset(9)),
    "a new opset": Broken("has opset 99; this version of onnx knows up to", opset(99)),
    "no mask": Broken("no valid|no input attention_mask", drop("input", "attention_mask")),
    "no past": Broken("no valid|no input past_key_values", drop("input", "past_key_values.1.key")),
    "no present": Broken("no output present.1.value.*with-past", drop("output", "present.1.value")),
    "no logits": Broken("no output logits", drop("output", "logits")),
    "an input too many": Broken("has an input use_cache_branch", changed(one_more_input)),
    "a past of integers": Broken("in float32 or float16", changed(integer_past)),
    "an operator that is none": Broken("no valid ONNX model.*NoSuch", changed(unknown_operator)),
    "a domain that is none": Broken("onnxruntime does not take", changed(unknown_domain)),
    "a product of nothing": Broken("onnxruntime does not take", changed(product_of_nothing)),
    "a tensor of no type": Broken("no valid|the type 99", changed(no_type)),
    "more layers": Broken(
        "no input past_key_values.2.key",
        lambda folder: change_json(folder / "config.json", num_hidden_layers=3),
    ),
    "fewer layers": Broken(
        "an input past_key_values.1.key, which a decoder of 1 layers",
        lambda folder: change_json(folder / "config.json", num_hidden_layers=1),
    ),
    "other heads": Broken(
        r"config.json implies \[batch, 4, tokens, 64\]",
        lambda folder: change_json(folder / "config.json", num_attention_heads=4),
    ),
    "another vocabulary": Broken(
        r"logits are \[4096\] wide",
        lambda folder: change_json(folder / "config.json", vocab_size=4000),
    ),
    "no config": Broken("has no config.json", lambda folder: (folder / "config.json").unlink()),
    "two models": Broken(
        "a.onnx, b.onnx",
        lambda folder: (
            [shutil.copy(folder / MODEL, folder / n) for n in ("a.onnx", "b.onnx")]
            and (folder / MODEL).unlink()
        ),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_are_one_line(case, folder):
    BROKEN[case].make(folder)
    with pytest.raises(UserError, match=BROKEN[case].words) as caught:
        OnnxDecoder(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def packed(onnx_of_opt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "int4"
    quantize_onnx(OnnxJob(onnx_of_opt, QuantPlan.uniform(QuantSpec.parse("4", 32))), folder)
    return folder


@pytest.mark.parametrize("value", [None, 0, 2**62])
@pytest.mark.parametrize("name", ["N", "K", "bits", "block_size"])
def test_attributes_of_a_packed_product_are_those_of_its_matrix(name, value, packed, tmp_path):
    """None: it has no such attribute; without bits there are 4, as these have."""
    folder = Path(shutil.copytree(packed, tmp_path / "int4"))

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
        attribute = next(a for a in node.attribute if a.name == name)
        if value is None:
            node.attribute.remove(attribute)
        else:
            attribute.i = value

    changed(change)(folder)
    if (name, value) == ("bits", None):
        OnnxDecoder(folder)
        return
    words = "MatMulNBits is run at 4 and 8" if name == "bits" else "not those of a matrix"
    with pytest.raises(UserError, match=words):
        OnnxDecoder(folder)


def test_a_model_of_another_name_is_found(folder):
    (folder / MODEL).rename(folder / "decoder_model.onnx")
    assert is_onnx(folder)
    assert OnnxDecoder(folder).config.vocab_size == 4096


def test_a_checkpoint_is_one_whatever_is_beside_it(folder):
    assert not is_onnx(tiny("opt"))
    (folder / "model.safetensors").write_bytes(b"")
    assert not is_onnx(folder)


def test_any_byte_may_be_wrong(folder):
    """A graph with bytes changed at random runs, or is one line."""
    data, draw = (folder / MODEL).read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        broken[draw.randrange(len(data))] = draw.randrange(256)
        (folder / MODEL).write_bytes(broken)
        try:
            OnnxDecoder(folder).prefill([[5, 6, 7]])
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused
