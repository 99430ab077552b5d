"""ONNX Runtime: MatMulNBits, and DynamicQuantizeMatMul for int8 x int8.

MatMulNBits runs at accuracy level 4, its fastest: x is rounded to int8 in the weights' blocks. At
level 0, which keeps x, it is 2 to 100 times slower. Copies are sessions that share one pool of
threads; with a pool each, as is the default, those of idle sessions spin and take the cores.
"""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.rivals.common import Layer, LayerBench, layer_bench, pack_nibbles

BLOCKS = (16, 32, 64, 128, 256)  # that MatMulNBits takes
ACCURACY_LEVEL = 4
CONTRIB = "com.microsoft"


def layers(n: int, k: int, bits: str, group: int, copies: int, threads: int) -> list[LayerBench]:
    """The operator for a bitwidth ("8:tc-li", "8", "4") and group; none, where there is none."""
    _thread_pool(threads)
    if bits == "8:tc-li":
        return [_dynamic(Layer.draw(n, k, 8, -1, symmetric=True), copies)]
    if bits in ("4", "8") and group in BLOCKS:
        return [_nbits(Layer.draw(n, k, int(bits), group), copies)]
    return []


@functools.cache
def _thread_pool(threads: int) -> None:
    """One pool for the process; a second, of another size, is an error of ONNX Runtime's."""
    onnxruntime.set_default_logger_severity(3)  # each session says that it ignores pool sizes
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def _nbits(layer: Layer, copies: int) -> LayerBench:
    n, k = layer.codes.shape
    settings = {"N": n, "K": k, "bits": layer.bits, "block_size": layer.group}
    settings["accuracy_level"] = ACCURACY_LEVEL

    def tensors(moved: Layer) -> dict[str, torch.Tensor]:
        pack = pack_nibbles if layer.bits == 4 else torch.clone
        codes = pack(moved.codes).view(n, k // layer.group, -1)
        return {"codes": codes, "scales": moved.scales, "zeros": pack(moved.zeros)}

    name = f"MatMulNBits, block {layer.group}, accuracy level {ACCURACY_LEVEL}"
    made = [_session("MatMulNBits", tensors(layer.rolled(i)), settings) for i in range(copies)]
    return _bench(name, str(layer.bits), layer, made)


def _dynamic(layer: Layer, copies: int) -> LayerBench:
    """A scale per output channel, and one for all rows of x."""

    def tensors(moved: Layer) -> dict[str, torch.Tensor]:
        return {"weight": moved.signed().t().contiguous(), "scales": moved.scales.view(-1)}

    operator = "DynamicQuantizeMatMul"
    made = [_session(operator, tensors(layer.rolled(i)), {}) for i in range(copies)]
    return _bench(operator, "8:tc-li", layer, made)


def _session(
    operator: str, tensors: dict[str, torch.Tensor], settings: dict[str, int]
) -> onnxruntime.InferenceSession:
    """A model of one operator, y = operator(x, *tensors)."""
    weights = [numpy_helper.from_array(tensor.numpy(), key) for key, tensor in tensors.items()]
    node = helper.make_node(operator, ["x", *tensors], ["y"], domain=CONTRIB, **settings)
    ends = [helper.make_tensor_value_info(e, TensorProto.FLOAT, [None, None]) for e in "xy"]
    graph = helper.make_graph([node], operator, ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    # Else its threads go on spinning behind a run, and take the processors of whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _bench(
    name: str, bits: str, layer: Layer, sessions: list[onnxruntime.InferenceSession]
) -> LayerBench:
    def copy(session: onnxruntime.InferenceSession) -> object:
        return lambda x: session.run_with_ort_values(["y"], {"x": x})[0]

    def prepare(x: torch.Tensor) -> onnxruntime.OrtValue:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x.numpy()))

    return layer_bench(
        name,
        bits,
        layer.size,
        layer.dense(),
        [copy(session) for session in sessions],
        prepare=prepare,
        finish=lambda _, y: torch.from_numpy(y.numpy()),
    )
