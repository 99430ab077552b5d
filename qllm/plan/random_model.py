"""Linears and models of random weights, of which the time is measured."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from qllm.config import LM_HEAD, QuantSpec
from qllm.layers import Linear, linear_class
from qllm.models import Decoder, RawConfig, read_config
from qllm.parallel.pipeline import ParallelContext
from qllm.plan.devices import Size


def random_linear(spec: QuantSpec, size: Size, dtype: torch.dtype, device: str) -> Linear:
    """A matrix of random weights, as a spec has it."""
    inputs, outputs = size
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
    return linear_class(spec).from_float(weight, None, spec, input_range=4.0)


def random_decoder(
    family: str,
    channels: int,
    sharing: int,
    hidden: int,
    layers: int,
    spec: QuantSpec,
    dtype: torch.dtype,
    device: str,
    vocab_size: int | None = None,
    parallel: ParallelContext | None = None,
) -> Decoder:
    """A model with random weights.

    Args:
        family: "llama" or "opt".
        channels, sharing: of a head; heads that share keys and values.
        spec: of the linears in layers.
        vocab_size: None: a multiple of the hidden size.
        parallel: of which this process has a stage; None: it has all of it.
    """
    heads = hidden // channels
    raw = {
        "model_type": family,
        "vocab_size": vocab_size or 4 * hidden,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,  # of Llama's three matrices
        "ffn_dim": 4 * hidden,  # of OPT's two
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // sharing,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    halves = range(2 * layers) if parallel is None else parallel.halves([1] * layers)
    config = read_config(RawConfig(raw, "the probe"))
    # As of a model that is loaded: layers of other stages are not run.
    device_map = {range(halves.start // 2, halves.stop // 2): torch.device(device)}
    model = Decoder(config, {}, dtype, parallel=parallel, halves=halves, device_map=device_map)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            fresh: Tensor = torch.randn(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(module, name, fresh * hidden**-0.5)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    made: dict[Size, Linear] = {}  # quantizing takes longer than copying
    for name, linear in linears.items():
        if name != LM_HEAD:
            size = linear.in_features, linear.out_features
            if size not in made:
                made[size] = random_linear(spec, size, dtype, device)
            quantized = copy.deepcopy(made[size])
            quantized.process_weights_after_loading()
            model.set_submodule(name, quantized)
    for layer in model.layers:
        layer.fuse_norms()
    return model
