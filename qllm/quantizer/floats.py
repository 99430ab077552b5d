"""The float model that is quantized: a part of it is in memory at a time, in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qllm.checkpoint.weights import Weights
from qllm.config import LM_HEAD, QuantSpec
from qllm.layers.fp16 import DenseLinear
from qllm.models import Decoder
from qllm.models.layer import PreNormLayer

# The modules in front of the layers, and behind them.
FRONT = ("embed", "embed_norm", "project_in", "positions")
LAYER_INPUTS = tuple(f"layer_inputs.{name}" for name in ("embed", "projection", "norm"))
BACK = ("final_norm", "project_out", LM_HEAD)


class FloatModel:
    """A checkpoint's model, whose modules are filled when they are needed, and dropped then.

    Attributes:
        model: on the meta device, but for what was filled.
    """

    def __init__(self, weights: Weights, device: str) -> None:
        self.weights, self.device = weights, device
        self.model = Decoder(weights.config, {}, torch.float32)

    def read(self, module: str, *, mapped: bool = False) -> dict[str, Tensor]:
        """A module's tensors as the checkpoint has them, "weight" and "bias"."""
        keys = [key for key in ("weight", "bias") if f"{module}.{key}" in self.weights.shapes]
        return {key: self.weights.read(f"{module}.{key}", mapped=mapped) for key in keys}

    def linear(self, name: str) -> DenseLinear:
        """A linear in the checkpoint's type; a tied head has the embedding's weight."""
        floats = self.read(name) or self.read("embed")
        return DenseLinear(floats["weight"].to(self.device), floats.get("bias"), QuantSpec())

    def fill(self, name: str, *, mapped: bool = False) -> None:
        """Give a module of the model its tensors: in float32, but for the embedding's."""
        tensors = self.read(name, mapped=mapped)
        if not tensors:
            return
        module = self.model.get_submodule(name)
        for key, tensor in tensors.items():
            value = tensor if name.endswith("embed") else tensor.float()
            setattr(module, key, value.to(self.device))

    def fill_layer(self, index: int, *, mapped: bool = False) -> None:
        """Give a layer its tensors."""
        for inner in modules_of(self.model.layers[index]):
            self.fill(f"layers.{index}.{inner}", mapped=mapped)

    def drop(self, names: Iterable[str]) -> None:
        """Let modules go."""
        for name in names:
            self.model.set_submodule(name, nn.Identity())


def modules_of(layer: PreNormLayer) -> list[str]:
    """The names of a layer's modules that hold tensors."""
    return [
        name
        for name, module in layer.named_modules()
        if any(True for _ in module.buffers(recurse=False))
    ]
