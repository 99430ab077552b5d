"""QLLM's own layers: the recorded call of a kernel, that of a decode step for few rows.

bfloat16 activations; weight-only layers keep 15 bits and a sign of them, or int8 of 128 inputs;
"8:tc-li" int8 of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch

from benchmarks.rivals.common import Layer, LayerBench, layer_bench
from qllm.config import QuantSpec
from qllm.layers import Linear, linear_class
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.ops import phase
from qllm.ops.cpu.capture import CapturedCalls, capture_calls
from qllm.quant.packing import PackedWeight, pack


def layers(n: int, k: int, bits: str, group: int, copies: int, threads: int) -> list[LayerBench]:
    """The layer of a bitwidth and group; weight-only ones asymmetric, and with int8 activations."""
    torch.set_num_threads(threads)
    whole = bits in {"8:tc-li", "16"}
    layer = Layer.draw(n, k, 8 if whole else int(bits), group, symmetric=whole)
    return [
        _bench(layer, bits, group, copies, int8) for int8 in ((False,) if whole else (False, True))
    ]


def _bench(layer: Layer, bits: str, group: int, copies: int, int8: bool) -> LayerBench:
    """The layer, its activations as int8 or not."""
    made = [_make(layer.rolled(i), bits, group) for i in range(copies)]
    for one in made:
        if int8:
            one.round_activations()
        one.process_weights_after_loading()
    name = "per channel" if group == -1 else f"group {group}"
    return layer_bench(
        f"{name}, activations 8" if int8 else name,
        bits,
        made[0].nbytes(),
        layer.dense(),
        [_captured(one) for one in made],
        prepare=torch.Tensor.bfloat16,
        finish=lambda _, y: y,
    )


def _make(layer: Layer, bits: str, group: int) -> Linear:
    if bits == "16":
        spec = QuantSpec.parse("16")
        return linear_class(spec).from_float(layer.dense().bfloat16(), None, spec, input_range=None)
    if bits == "8:tc-li":
        spec = QuantSpec.parse(bits)
        return linear_class(spec)(layer.signed(), layer.scales[:, 0].half(), None, spec)
    spec = QuantSpec.parse(bits, group, "asym")
    packed = PackedWeight(pack(layer.codes, layer.bits), layer.scales.half(), layer.zeros)
    return WeightOnlyLinear.from_packed(packed, None, spec, layer.codes.shape[1])


DECODE_ROWS = 16  # more are multiplied as in a prefill


def _captured(layer: Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer, whose calls are captured at the first use of an input and then replayed."""
    calls: dict[int, tuple[CapturedCalls, torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def run(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in calls:
            step = phase.decode() if len(x) <= DECODE_ROWS else nullcontext()
            with step, capture_calls() as captured:
                y = layer(x)
            calls[id(x)] = captured, x, y
        captured, _, y = calls[id(x)]
        if captured.graph_break:
            return layer(x)
        captured.replay()
        return y

    return run
