"""transformers' models as torch exports them: what optimum's exports are made with."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from oracle import pretrained
from torch import Tensor, nn
from transformers import DynamicCache


class WithPast(nn.Module):
    """A causal language model that takes and returns its keys and values one by one."""

    def __init__(self, model: nn.Module, positions: bool) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *rest: Tensor) -> tuple:
        extra = {"position_ids": rest[0]} if self.positions else {}
        past = rest[self.positions :]
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(input_ids, attention_mask=attention_mask, past_key_values=cache, **extra)
        layers = out.past_key_values.layers
        return (out.logits, *(each for layer in layers for each in (layer.keys, layer.values)))


def torch_export(source: Path, folder: Path) -> Path:
    """A folder with a checkpoint in float32, of optimum's names for its inputs and outputs."""
    model = pretrained(source)
    config = model.config
    positions = config.model_type == "llama"
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = config.hidden_size // config.num_attention_heads
    rows, length, past = 2, 3, 4
    given = {
        "input_ids": torch.ones(rows, length, dtype=torch.int64),
        "attention_mask": torch.ones(rows, length + past, dtype=torch.int64),
    }
    if positions:
        given["position_ids"] = torch.arange(past, past + length).repeat(rows, 1)
    axes = {name: {0: "batch_size", 1: f"{name}_length"} for name in given}
    outputs = ["logits"]
    for index in range(config.num_hidden_layers):
        for what in ("key", "value"):
            name = f"past_key_values.{index}.{what}"
            given[name] = torch.zeros(rows, kv_heads, past, dim)
            axes[name] = {0: "batch_size", 2: "past_sequence_length"}
            outputs.append(f"present.{index}.{what}")
            axes[outputs[-1]] = {0: "batch_size", 2: "total_sequence_length"}
    axes["logits"] = axes["input_ids"]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, which is the one optimum takes
        torch.onnx.export(
            WithPast(model, positions),
            tuple(given.values()),
            str(folder / "model.onnx"),
            input_names=list(given),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return folder
