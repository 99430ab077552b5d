"""OpenVINO: a matrix product whose weight is decompressed in the graph, as NNCF writes it.

    integers -> float16, minus zeros, times scales -> (N, K) -> float32 -> MatMul

The CPU plugin keeps the integers and, by default, rounds x to int8 in groups of 32 ("dynamic
quantization"). Of the groups it offers, 128 was the fastest, or the weights' group where that is
smaller; a group that the weights' is not a multiple of switches it off. Both the default and the
fastest are here; with one group for all of a row, 8 bits per channel are "8:tc-li".
The arithmetic around it is the plugin's default: bfloat16 where the machine has it.
"""

from __future__ import annotations

import functools

import numpy as np
import openvino
import torch
from openvino import opset13 as ops

from benchmarks.rivals.common import Layer, LayerBench, layer_bench, pack_nibbles

DEFAULT_GROUP = 32
FASTEST_GROUP = 128


def layers(n: int, k: int, bits: str, group: int, copies: int, threads: int) -> list[LayerBench]:
    """Products for a bitwidth ("8:tc-li", "8", "4") and group; none, where there is none."""
    bench = functools.partial(_bench, bits=bits, copies=copies, threads=threads)
    if bits == "8:tc-li":
        return [bench(Layer.draw(n, k, 8, -1, symmetric=True), rounding=k)]
    if bits in ("4", "8"):
        layer = Layer.draw(n, k, int(bits), group)
        groups = {DEFAULT_GROUP, min(FASTEST_GROUP, layer.group)}
        return [bench(layer, rounding=found) for found in sorted(groups)]
    return []


def _bench(layer: Layer, *, bits: str, copies: int, threads: int, rounding: int) -> LayerBench:
    """`rounding`: of how many values of x have a scale together."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(rounding),
    }
    core = openvino.Core()

    def copy(index: int) -> object:
        request = core.compile_model(_graph(layer.rolled(index)), "CPU", settings)
        request = request.create_infer_request()

        def run(x: openvino.Tensor) -> openvino.Tensor:
            request.set_input_tensor(x)
            request.infer(share_outputs=True)
            return request.get_output_tensor()

        return run

    k = layer.codes.shape[1]
    group = "per channel" if layer.group == k else f"group {layer.group}"
    setting = "a row" if rounding == k else f"{rounding}"
    setting += " (default)" if rounding == DEFAULT_GROUP else ""
    return layer_bench(
        f"MatMul, {group}, dynamic quantization of {setting}",
        bits,
        layer.size,
        layer.dense(),
        [copy(i) for i in range(copies)],
        prepare=lambda x: openvino.Tensor(x.numpy().copy(), shared_memory=True),
        finish=lambda _, y: torch.from_numpy(y.data.copy()),
    )


def _graph(layer: Layer) -> openvino.Model:
    n, k = layer.codes.shape
    groups = k // layer.group
    shape, each = ([n, groups, layer.group], [n, groups, 1]) if groups > 1 else ([n, k], [n, 1])
    integer = openvino.Type.u4 if layer.bits == 4 else openvino.Type.u8
    weight = ops.convert(_constant(layer.codes, shape, integer), np.float16)
    zeros = ops.convert(_constant(layer.zeros, each, integer), np.float16)
    scales = ops.constant(layer.scales.half().numpy().reshape(each))
    weight = ops.multiply(ops.subtract(weight, zeros), scales)
    if groups > 1:
        weight = ops.reshape(weight, ops.constant(np.array([n, k])), special_zero=False)
    x = ops.parameter([-1, k], np.float32)
    return openvino.Model([ops.matmul(x, ops.convert(weight, np.float32), False, True)], [x])


def _constant(values: torch.Tensor, shape: list[int], integer: openvino.Type) -> openvino.Node:
    """Values of 4 or 8 bits; a tensor of OpenVINO's own memory, which the node keeps alive."""
    tensor = openvino.Tensor(integer, openvino.Shape(shape))
    flat = values.reshape(-1)
    packed = pack_nibbles(flat) if integer == openvino.Type.u4 else flat
    tensor.data.reshape(-1)[:] = packed.numpy()
    return ops.constant(tensor)
