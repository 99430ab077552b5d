"""The module tree: what is in it, how it is merged, and that it needs no weights."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny
from oracle import load, our_bundled

from qllm.bench.tree import Node, lines, tree
from qllm.checkpoint.load import module_bytes, outline
from qllm.config import QuantPlan, QuantSpec
from qllm.layers import Linear
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from tools.random_checkpoint import PUBLISHED, TENSORS, write_checkpoint


def nodes(node: Node):
    yield node
    for child in node.children:
        yield from nodes(child)


def named(node: Node, path: str) -> Node:
    """A node by the names of those above it, the root's left out."""
    for name in path.split("/"):
        (node,) = (child for child in node.children if child.name == name)
    return node


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bitwidth", ["16", "4", "3", "8:tc-li", "8:tc"])
def test_sums_are_those_of_the_loaded_model(family, bitwidth):
    """Before a kernel takes the weights: it may give them more room."""
    root = tree(outline(tiny(family), QuantPlan.parse(bitwidth), torch.float16))
    if bitwidth != "8:tc":  # which loads with a calibration only
        assert root.nbytes == module_bytes(load(tiny(family), bitwidth, dtype=torch.float16))
    linears = [m for m in our_bundled(family).layers.modules() if isinstance(m, Linear)]
    weights = sum(m.weight.numel() for m in linears)
    assert root.quantized == (0 if bitwidth == "16" else weights)
    distinct = {b.data_ptr(): b.numel() for b in our_bundled(family).buffers()}
    assert root.parameters == sum(distinct.values())
    for node in nodes(root):
        below = sum(child.parameters for child in node.children)
        assert node.parameters % node.count == 0
        assert below <= node.parameters // node.count


def test_equal_layers_are_one_node():
    root = tree(outline(tiny("llama"), QuantPlan.parse("4")))
    (layers,) = named(root, "layers").children
    assert (layers.name, layers.count, layers.kind) == ("0-5", 6, "PreNormLayer")
    qkv = named(layers, "attention/qkv")
    assert (qkv.kind, qkv.bits, qkv.group_size) == ("WeightOnlyLinear", 4, 128)
    assert qkv.about == "256 -> 512, 4 bits, group 128, asym"
    assert ("qweight", "uint8", (512, 128)) in qkv.tensors
    assert layers.parameters == 6 * (layers.parameters // 6)


def test_layers_that_differ_stand_apart():
    root = tree(outline(tiny("opt"), QuantPlan.parse("4,4,8,8,8,4")))
    assert [(n.name, n.count) for n in named(root, "layers").children] == [
        ("0-1", 2),
        ("2-4", 3),
        ("5", 1),
    ]


def test_a_tied_head_counts_once_and_a_quantized_one_for_itself():
    tied = tree(outline(tiny("opt"), QuantPlan.parse("4")))
    head = named(tied, "lm_head")
    assert head.tied and head.parameters == head.nbytes == 0
    plan = QuantPlan.parse("4").with_rule("lm_head", QuantSpec.parse("8"))
    own = tree(outline(tiny("opt"), plan))
    head = named(own, "lm_head")
    assert not head.tied and head.bits == 8 and head.parameters == 4096 * 256
    assert own.quantized == tied.quantized + head.parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_quantized_checkpoint(family, tmp_path):
    plan = QuantPlan.uniform(QuantSpec.parse("3", 64))
    quantize_checkpoint(Job(tiny(family), plan), tmp_path / "out")
    dense = QuantPlan.uniform(QuantSpec())
    root = tree(outline(tmp_path / "out", dense))
    assert root.nbytes == module_bytes(load(tmp_path / "out", plan=dense, dtype=torch.float16))
    linear = named(root, "layers/0-5/mlp/down")
    assert (linear.bits, linear.group_size) == (3, 64)


def sparse(folder: Path, config: dict) -> Path:
    """A checkpoint whose weights are a hole in a file."""
    write_checkpoint(folder, config, weights=False)
    header, end = {}, 0
    for name, shape in TENSORS[config["model_type"]](config):
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
    os.truncate(folder / "model.safetensors", 8 + len(data) + end)
    return folder


def test_seven_billion_parameters(tmp_path):
    """Of a file that has no room for them on the disk: none is read."""
    folder = sparse(tmp_path / "7b", PUBLISHED["meta-llama/Llama-2-7b-hf"])
    root = tree(outline(folder, QuantPlan.parse("4")))
    assert root.parameters == 6_738_415_616  # as the model's card counts them
    assert root.quantized == root.parameters - 2 * 32000 * 4096 - (2 * 32 + 1) * 4096
    assert root.nbytes < 4.5e9
    assert named(root, "layers/0-31").count == 32


def test_lines_say_what_is_there():
    text = lines(tree(outline(tiny("bloom"), QuantPlan.parse("4"))))
    assert text[0].startswith("model (Decoder)")
    assert any("├── embed (Embedding)" in line and "float16[4096,256]" in line for line in text)
    assert any("0-5 (PreNormLayer) x 6" in line for line in text)
    assert any("lm_head" in line and line.endswith("tied") for line in text)
    assert text[-1].endswith("of them quantized")


def test_as_json():
    root = tree(outline(tiny("opt"), QuantPlan.parse("4")))
    value = json.loads(json.dumps(root.to_json()))
    assert value["class"] == "Decoder"
    assert [child["name"] for child in value["children"]][:2] == ["embed", "positions"]
    assert value["parameters"] == root.parameters and value["bytes"] == root.nbytes
