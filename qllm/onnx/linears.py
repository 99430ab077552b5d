"""The linears of an ONNX graph: products with a constant matrix, whoever exported it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from qllm.config import LM_HEAD
from qllm.onnx.nbits import OPERATOR

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
# The domain whose operators onnx's checker knows, and with them how many inputs they have.
STANDARD = ("", "ai.onnx")
# What exporters call the list of layers; ours is "layers".
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+\..*)")

# Under this name torch.onnx lists the modules around a node.
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class OnnxLinear:
    """x @ W + bias, for W (K, N) in the graph.

    Attributes:
        index: of its node.
        name: of its module, "layers.0.self_attn.q_proj"; "lm_head" for the one behind the layers.
        x: the tensor it takes.
        weight: the initializer.
        rows, columns: N and K.
        transposed: the initializer is (N, K).
        bias: the tensor that it adds itself; "" for none.
    """

    index: int
    name: str
    x: str
    weight: str
    rows: int
    columns: int
    transposed: bool
    bias: str


def find_linears(graph: onnx.GraphProto, vocab_size: int) -> list[OnnxLinear]:
    """The linears of a graph that are not quantized, in the order in which they run.

    Args:
        vocab_size: output channels of the LM head.
    """
    constants = _matrices(graph)
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    found = []
    for index, node in enumerate(graph.node):
        settings = {attribute.name: attribute for attribute in node.attribute}
        transposed, bias = False, ""
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in STANDARD:
            continue
        if node.input[1] not in constants:
            continue
        if node.op_type == "Gemm":
            plain = all(
                settings[name].f == 1.0 for name in ("alpha", "beta") if name in settings
            ) and not ("transA" in settings and settings["transA"].i)
            if not plain:
                continue
            transposed = "transB" in settings and bool(settings["transB"].i)
            bias = node.input[2] if len(node.input) > 2 else ""
            if bias and bias not in vectors:
                continue  # it may be a matrix, or one number
        tensor, is_transposed = constants[node.input[1]]
        transposed ^= is_transposed
        columns, rows = reversed(tensor.dims) if transposed else tensor.dims
        name = module_name(node, tensor.name)
        found.append(
            OnnxLinear(index, name, node.input[0], tensor.name, rows, columns, transposed, bias)
        )
    heads = [i for i, linear in enumerate(found) if linear.rows == vocab_size]
    if heads:
        last = found[heads[-1]]
        found[heads[-1]] = OnnxLinear(**{**vars(last), "name": LM_HEAD})
    return found


def _matrices(graph: onnx.GraphProto) -> dict[str, tuple[TensorProto, bool]]:
    """Constant float matrices by name, and whether a Transpose has made them what they are."""
    found = {
        tensor.name: (tensor, False)
        for tensor in graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type in FLOATS
    }
    for node in graph.node:
        passes_on = node.op_type in ("Transpose", "Identity") and node.domain in STANDARD
        if passes_on and node.input[0] in found:
            tensor, is_transposed = found[node.input[0]]
            perm = [axis for each in node.attribute if each.name == "perm" for axis in each.ints]
            swaps = node.op_type == "Transpose" and perm != [0, 1]  # without one it is [1, 0]
            found[node.output[0]] = (tensor, is_transposed ^ swaps)
    return found


def module_name(node: onnx.NodeProto, weight: str) -> str:
    """The module that a node computes, as its exporter named it."""
    name = weight.removesuffix(".weight")
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    modules = [each for each in re.findall(r"'([^']*)'", scopes) if each]
    if len(modules) > 1:  # the last is the operator's
        name = modules[-2]
    elif name == weight:
        name = node.name.strip("/").rpartition("/")[0].replace("/", ".") or node.output[0]
    inner = LAYER.search(name)
    return f"layers.{inner[1]}" if inner else name


def multiplied(graph: onnx.GraphProto, vocab_size: int) -> int:
    """Weights that each token is multiplied by in the layers, packed ones included."""
    linears = find_linears(graph, vocab_size)
    dense = sum(each.rows * each.columns for each in linears if each.name != LM_HEAD)
    return dense + sum(n * k for n, k in packed_shapes(graph) if n != vocab_size)


def packed_shapes(graph: onnx.GraphProto) -> Iterator[tuple[int, int]]:
    """N and K of each MatMulNBits."""
    for node in graph.node:
        if node.op_type == OPERATOR:
            settings = {attribute.name: attribute.i for attribute in node.attribute}
            yield settings["N"], settings["K"]


def looked_up(graph: onnx.GraphProto) -> set[str]:
    """Initializers of which a token reads a row, and nothing reads the rest: embeddings."""
    names = {name for node in graph.node if node.op_type == "Gather" for name in node.input[:1]}
    for node in graph.node:
        names -= set(node.input[1:] if node.op_type == "Gather" else node.input)
    return names
