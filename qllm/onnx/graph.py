"""An ONNX graph while it is built: nodes in a list, weights in a file as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qllm import __version__
from qllm.errors import UserError, first_line
from qllm.onnx import external
from qllm.onnx.nbits import DOMAIN, OPERATOR, NBits

MODEL, DATA = "model.onnx", "model.onnx_data"
OPSET, IR_VERSION = 21, 10
# Tensors in the data file begin on a page, so that a runtime can map them.
ALIGNMENT = 4096
# Smaller ones stay in the graph.
SMALLEST_EXTERNAL = 1024

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


class DataFile:
    """Tensors appended to a file of external data, of which none stays in memory."""

    def __init__(self, folder: Path, name: str = DATA) -> None:
        self.name = name
        self._file: BinaryIO = (folder / name).open("wb")

    def add(self, name: str, tensor: Tensor) -> TensorProto:
        """Append a tensor: the initializer that says where it is."""
        array = tensor.contiguous().numpy()
        if array.nbytes < SMALLEST_EXTERNAL:
            return numpy_helper.from_array(array, name)
        proto = TensorProto(name=name, data_type=TYPES[tensor.dtype], dims=tensor.shape)
        self._external(proto, array.nbytes)
        self._file.write(array.reshape(-1).view(np.uint8).data)
        return proto

    def move(self, tensor: TensorProto, folder: Path) -> TensorProto:
        """Append the tensor of another model, which may keep its data in a file of `folder`."""
        whole = external.load(tensor, folder)
        if whole.HasField("raw_data") and len(whole.raw_data) >= SMALLEST_EXTERNAL:
            data = whole.raw_data
            whole.ClearField("raw_data")
            self._external(whole, len(data))
            self._file.write(data)
        return whole

    def _external(self, proto: TensorProto, size: int) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        proto.data_location = TensorProto.EXTERNAL
        entries = {"location": self.name, "offset": self._file.tell(), "length": size}
        for key, value in entries.items():
            proto.external_data.add(key=key, value=str(value))

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class Graph:
    """Nodes and initializers, and short ways to add one.

    Attributes:
        scope: what the names of new nodes begin with.
    """

    def __init__(self, data: DataFile) -> None:
        self.data, self.scope = data, ""
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._constants: dict[tuple, str] = {}

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """A node of one output, whose name this returns."""
        return self.ops(kind, *inputs, outputs=[output], **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, outputs: list[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node, and the names of its outputs; those given as "" are made up."""
        name = f"{self.scope}/{kind}_{len(self.nodes)}"
        outputs = [given or f"{name}:{i}" for i, given in enumerate(outputs)]
        node = helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return outputs

    def constant(self, value: object, dtype: type | np.dtype = np.int64) -> str:
        """A small tensor; equal ones are one."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def weight(self, name: str, tensor: Tensor) -> str:
        """A tensor, written to the data file."""
        self.initializers.append(self.data.add(name, tensor))
        return name

    def matmul_nbits(
        self, x: str, name: str, matrix: NBits, bias: str = "", *, level: int, output: str = ""
    ) -> str:
        """x (…, K) times a matrix of packed integers, and what may be added: (…, N)."""
        if matrix.perm is not None:
            x = self.op("Gather", x, self.weight(f"{name}.perm", matrix.perm), axis=-1)
        inputs = [
            x,
            self.weight(f"{name}.qweight", matrix.weight),
            self.weight(f"{name}.scales", matrix.scales),
            "" if matrix.zeros is None else self.weight(f"{name}.qzeros", matrix.zeros),
            *(["", bias] if bias else []),
        ]
        settings = {"N": len(matrix.weight), "K": matrix.columns, "bits": matrix.bits}
        settings |= {"block_size": matrix.block, "accuracy_level": level}
        (found,) = self.ops(OPERATOR, *inputs, outputs=[output], domain=DOMAIN, **settings)
        return found

    def model(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The whole."""
        graph = helper.make_graph(self.nodes, "qllm", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="qllm",
            producer_version=__version__,
        )


def save(model: onnx.ModelProto, folder: Path) -> None:
    """Write a model whose weights are in the folder already, once it is checked.

    Raises:
        UserError: where shapes or types do not go together, which those of another's graph may.
    """
    path = folder / MODEL
    path.write_bytes(model.SerializeToString())
    try:
        onnx.checker.check_model(str(path))
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"the graph is no valid ONNX model ({first_line(error)})") from None
