"""An ONNX graph run in stages over samples, cut in front of the linears that share an input."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime import OrtValue
from torch import Tensor

from qllm.errors import UserError, first_line
from qllm.onnx import external
from qllm.onnx.external import nbytes
from qllm.onnx.linears import OnnxLinear
from qllm.onnx.model import POSITIONS, TOKENS, value_shape
from qllm.onnx.runner import session

# Larger initializers are given to onnxruntime beside the graph of a stage, not in it.
INLINE_BYTES = 1 << 16


class Stages:
    """What crosses a cut lies on the disk, one file per sample.

    Attributes:
        groups: the linears that share an input, in the order in which they run.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        linears: Sequence[OnnxLinear],
        source: Path,
        samples: Sequence[Sequence[int]],
        folder: Path,
    ) -> None:
        """
        Args:
            source: the model's folder.
            samples: token ids, all of one length.
            folder: where to keep what crosses a cut; it is made.
        """
        self._model, self._source = model, source
        by_input: dict[str, list[OnnxLinear]] = {}
        for linear in linears:
            by_input.setdefault(linear.x, []).append(linear)
        self.groups = list(by_input.values())
        self._linears = {linear.index for linear in linears}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes = _needed(model.graph, set(by_input), self._linears, self._initializers)
        self._dependent = _dependent(model.graph, TOKENS[0])
        self._replaced: dict[int, np.ndarray] = {}
        self._begin = 0
        length = len(samples[0])
        self._shared = self._inputs(length)
        folder.mkdir()
        self._files = [folder / f"{number}.npz" for number in range(len(samples))]
        for file, sample in zip(self._files, samples, strict=True):
            _write(file, {TOKENS[0]: np.array([sample], np.int64)})

    def _inputs(self, length: int) -> dict[str, np.ndarray]:
        """What every sample gets: a mask of ones, positions, an empty past."""
        given = {}
        for value in self._model.graph.input:
            kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            if value.name == POSITIONS:
                given[value.name] = np.arange(length, dtype=kind)[None]
            elif value.name == TOKENS[1]:
                given[value.name] = np.ones((1, length), kind)
            elif value.name.startswith("past_key_values."):
                _, heads, _, dim = value_shape(value)
                given[value.name] = np.zeros((1, heads or 0, 0, dim or 0), kind)
        return given

    def replace(self, linear: OnnxLinear, matrix: Tensor) -> None:
        """Let a linear compute with another matrix (N, K) from here on."""
        node = self._model.graph.node[linear.index]
        transposed = node.op_type == "Gemm" and any(
            a.name == "transB" and a.i for a in node.attribute
        )
        self._replaced[linear.index] = (matrix if transposed else matrix.t()).contiguous().numpy()

    def run(self, group: Sequence[OnnxLinear]) -> Iterator[Tensor]:
        """Run up to the first linear of the next of `groups`: its input, of each sample.

        Raises:
            UserError: where onnxruntime cannot.
        """
        end, x = group[0].index, group[0].x
        stage = [i for i in self._nodes if self._begin <= i < end]
        live = {name for i, node in self._nodes.items() if i >= end for name in node.input}
        made = {name for i in stage for name in self._nodes[i].output}
        wanted = sorted(made & live)
        model, weights = self._stage_model(stage, wanted)
        ready = session(model) if stage else None
        names = {value.name for value in ready.get_inputs()} if ready else set()
        fixed = {name: OrtValue.ortvalue_from_numpy(each) for name, each in weights.items()}
        for file in self._files:
            values = _read(file)
            if ready:
                known = self._shared | values
                given = {n: OrtValue.ortvalue_from_numpy(known[n]) for n in names - set(fixed)}
                try:
                    found = ready.run_with_ort_values(wanted, given | fixed)
                except Exception as error:  # onnxruntime's own classes derive from nothing narrower
                    line = first_line(error)
                    raise UserError(f"onnxruntime cannot run the model: {line}") from None
                new = {n: v.numpy() for n, v in zip(wanted, found, strict=True)}
                values |= {n: v for n, v in new.items() if n in self._dependent}
                self._shared |= {n: v for n, v in new.items() if n not in self._dependent}
            values = {n: v for n, v in values.items() if n in live}
            _write(file, values)
            yield torch.from_numpy(values[x])
        self._shared = {n: v for n, v in self._shared.items() if n in live}
        for index in stage:
            self._replaced.pop(index, None)
        self._begin = end

    def _stage_model(
        self, stage: list[int], wanted: list[str]
    ) -> tuple[bytes, dict[str, np.ndarray]]:
        """The graph of some nodes, and what it takes besides the values of a sample."""
        nodes, inline, weights = [], [], {}
        made: set[str] = set()
        for index in stage:
            node = onnx.NodeProto()
            node.CopyFrom(self._nodes[index])
            if index in self._replaced:
                node.input[1] = f"replaced.{index}"
                weights[node.input[1]] = self._replaced[index]
            made |= set(node.output)
            nodes.append(node)
        names = {name for node in nodes for name in node.input if name} - made - set(weights)
        for name in sorted(names & set(self._initializers)):
            tensor = self._initializers[name]
            array = external.values(tensor, self._source)
            if nbytes(tensor) > INLINE_BYTES:
                weights[name] = array
            else:
                inline.append(numpy_helper.from_array(array, name))
        values = {name: self._value(name) for name in names - set(self._initializers)}
        values |= {name: (array.dtype, array.ndim) for name, array in weights.items()}
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(dtype), [None] * rank
            )
            for name, (dtype, rank) in values.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
        graph = helper.make_graph(nodes, "stage", inputs, outputs, inline)
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        return model.SerializeToString(), weights

    def _value(self, name: str) -> tuple[np.dtype, int]:
        """Type and rank of what is there already."""
        if name in self._shared:
            return self._shared[name].dtype, self._shared[name].ndim
        value = _read(self._files[0], (name,))[name]
        return value.dtype, value.ndim


def _write(file: Path, values: Mapping[str, np.ndarray]) -> None:
    """Tensors by number: a name may be one of the parameters of `np.savez`."""
    np.savez(file, np.array(list(values)), *values.values())


def _read(file: Path, wanted: Container[str] | None = None) -> dict[str, np.ndarray]:
    """The inverse; or some of the tensors, the others of which are not read."""
    with np.load(file) as found:
        names = enumerate(found["arr_0"].tolist(), 1)
        return {n: found[f"arr_{i}"] for i, n in names if wanted is None or n in wanted}


def _needed(
    graph: onnx.GraphProto, wanted: set[str], linears: set[int], weights: dict[str, Any]
) -> dict[int, onnx.NodeProto]:
    """The nodes that some tensors come from and the linears among those that take them, by index.

    The matrix of a linear will be another; where the present one comes from does not matter.
    """
    wanted, found = set(wanted), {}
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        if wanted & set(node.output):
            found[index] = node
            inputs = list(node.input)
            if index in linears:
                del inputs[1]
            wanted |= {name for name in inputs if name and name not in weights}
    # The linears that need only be known as the end of a stage.
    found |= {index: graph.node[index] for index in linears}
    return dict(sorted(found.items()))


def _dependent(graph: onnx.GraphProto, root: str) -> set[str]:
    """The tensors whose values, and not only their shapes, depend on an input."""
    found = {root}
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and found & set(node.input):
            found |= set(node.output)
    return found
