"""An ONNX model of a folder, read without its weights and checked before anything uses it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from qllm.config import ModelConfig
from qllm.errors import UserError, first_line
from qllm.files import check_file
from qllm.onnx.decoder import LOGITS
from qllm.onnx.external import check_data, files, nbytes, without_links
from qllm.onnx.graph import MODEL
from qllm.onnx.nbits import BITS, OPERATOR
from qllm.onnx_files import onnx_files

# Before 13, the operators that decoders are made of took their axes in other places.
OLDEST_OPSET = 13
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
TOKENS = ("input_ids", "attention_mask")
POSITIONS = "position_ids"
EXPORT = "optimum-cli export onnx --task text-generation-with-past makes one that has"


def model_file(folder: Path) -> Path:
    """The model of a folder: model.onnx, or the only one there is.

    Raises:
        UserError: where there are several, or none.
    """
    found = onnx_files(folder)
    for path in found:
        if path.name == MODEL or len(found) == 1:
            return path
    names = ", ".join(path.name for path in found) or "none"
    advice = f"; name one of them, such as {found[0]}" if found else ""
    raise UserError(
        f"{folder} has no {MODEL}, nor one other .onnx file alone (it has {names}){advice}"
    )


def read_model(path: Path) -> onnx.ModelProto:
    """The graph of a file, its external data checked and left where it is.

    Raises:
        UserError: for a file that is broken, an opset that is not known, or external data that is
            missing, too short or outside of the folder.
    """
    try:
        check_file(path)
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise UserError(f"{path} is no whole ONNX model ({first_line(error)})") from None
    if not model.graph.node:
        raise UserError(f"{path} is no ONNX model: it has no graph")
    opset = opset_of(model)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise UserError(
            f"{path} has opset {opset}; this version of onnx knows up to {newest}, and QLLM takes "
            f"{OLDEST_OPSET} and later: export it again with one in between, such as 17"
        )
    for tensor in tensors(model.graph):
        check_data(path, tensor)
    try:
        with without_links(path, files(path, tensors(model.graph))) as checked:
            onnx.checker.check_model(str(checked))
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:  # names may be any bytes
        raise UserError(f"{path} is no valid ONNX model ({first_line(error)})") from None
    return model


def model_files(path: Path) -> list[Path]:
    """A model, and what it keeps its weights in."""
    return [path, *files(path, tensors(read_model(path).graph))]


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators that a model was written with."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)


def tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """All tensors of a graph: its initializers, and those in its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from tensors(inner)


def value_shape(value: onnx.ValueInfoProto) -> list[int | None]:
    """The sizes of an input or output; None for those that are open."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def check_decoder(model: onnx.ModelProto, config: ModelConfig, path: Path) -> int:
    """Refuse a graph that is no decoder with past, or another than config.json says.

    Returns:
        the type of its keys and values, as `TensorProto` numbers it.

    Raises:
        UserError: naming the first input or output that is missing or odd.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in weights}
    outputs = {value.name: value for value in model.graph.output}
    past = [f"{i}.{what}" for i in range(config.num_layers) for what in ("key", "value")]
    wanted = [*TOKENS, *(f"past_key_values.{name}" for name in past)]
    for name in wanted:
        if name not in inputs:
            raise UserError(f"{path} has no input {name}; {EXPORT} it")
    for name in (LOGITS, *(f"present.{name}" for name in past)):
        if name not in outputs:
            raise UserError(f"{path} has no output {name}; {EXPORT} it")
    for name in inputs:
        if name not in (*wanted, POSITIONS):
            raise UserError(
                f"{path} has an input {name}, which a decoder of {config.num_layers} layers does "
                f"not take; {EXPORT} {', '.join(TOKENS)} and past_key_values"
            )
    kind = inputs[wanted[-1]].type.tensor_type.elem_type
    shape = [config.num_kv_heads, config.head_dim]
    for name in wanted[len(TOKENS) :]:
        found = value_shape(inputs[name])
        fits = len(found) == 4 and [found[1], found[3]] == shape
        if not fits or kind not in FLOATS or inputs[name].type.tensor_type.elem_type != kind:
            raise UserError(
                f"{path}: {name} has the shape {found}; config.json implies "
                f"[batch, {shape[0]}, tokens, {shape[1]}], in float32 or float16"
            )
    vocab = value_shape(outputs[LOGITS])[-1:]
    if vocab not in ([None], [config.vocab_size]):
        raise UserError(
            f"{path}: {LOGITS} are {vocab} wide, config.json implies {config.vocab_size}"
        )
    held = sum(nbytes(tensor) for tensor in tensors(model.graph))
    if math.prod(shape) > held:
        raise UserError(
            f"{path} has {held} bytes of weights; config.json implies {math.prod(shape)} channels "
            "of keys"
        )
    sizes = {tensor.name: nbytes(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            _check_nbits(node, sizes, path)
    return kind


def _check_nbits(node: onnx.NodeProto, sizes: dict[str, int], path: Path) -> None:
    """Refuse a packed product whose attributes are not those of its matrix.

    Args:
        sizes: bytes of each initializer.
    """
    settings = {a.name: a.i for a in node.attribute if a.type == a.INT}
    bits = settings.setdefault("bits", BITS[0])
    if bits not in BITS:
        raise UserError(
            f"{path}: {node.name} has {bits} bits; {OPERATOR} is run at "
            f"{' and '.join(map(str, BITS))}"
        )
    rows, columns, block = (settings.get(name, 0) for name in ("N", "K", "block_size"))
    matrix = node.input[1] if len(node.input) > 1 else ""
    fits = min(rows, columns, block) > 0 and sizes.get(matrix) == rows * -(-columns // block) * (
        block * bits // 8
    )
    if not fits:
        raise UserError(
            f"{path}: {node.name} has N {rows}, K {columns} and block_size {block}, which are not "
            f"those of a matrix {matrix!r} of {sizes.get(matrix, 0)} bytes; export it again"
        )


def bitwidth(model: onnx.ModelProto) -> str:
    """The bits of its packed matrices, each once in the order in which they come; else 16."""
    found = [
        str(next((a.i for a in node.attribute if a.name == "bits"), BITS[0]))
        for node in model.graph.node
        if node.op_type == OPERATOR
    ]
    return ",".join(dict.fromkeys(found)) or "16"
