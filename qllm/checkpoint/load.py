"""Build a model on the meta device and fill it, one module after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qllm.checkpoint.formats import Int8Weight
from qllm.checkpoint.reader import Checkpoint
from qllm.checkpoint.weights import Weights
from qllm.config import DEFAULT_ACTIVATION_BITS, DEFAULT_ALGORITHM, LM_HEAD, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear, linear_class
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.memory import check_fits
from qllm.models import Decoder
from qllm.models.cache import KVCache
from qllm.models.equalize import NORMS, can_divide, divide_rows
from qllm.parallel.pipeline import balance
from qllm.quant.calibrate import Calibration
from qllm.quant.packing import PackedWeight
from qllm.quant.smooth import smooth_scales

Progress = Callable[[list], Iterable]


def load_model(
    folder: Path,
    plan: QuantPlan,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    num_shards: int = 1,
    calibration: Calibration | None = None,
    cache_shape: tuple[int, int] = (0, 0),
    activation_bits: int = DEFAULT_ACTIVATION_BITS,
    progress: Progress = iter,
) -> Decoder:
    """Load a 16- or 32-bit checkpoint, quantizing each layer as it comes; or a quantized one.

    Args:
        folder: a checkpoint of a known family, in Hugging Face's or QLLM's layout.
        plan: which layer gets which spec; 16 bits for a checkpoint that is quantized already.
        dtype: of activations and dense weights; None is the checkpoint's.
        device: where the model goes.
        num_shards: contiguous layer ranges of about equal bytes.
        calibration: activation ranges, for W8A8 layers.
        cache_shape: rows and tokens of the KV cache that must fit beside the model.
        activation_bits: 8: layers of 1 to 8 bits multiply activations as int8, one scale per 128
            inputs; 16: as exactly as 16-bit types allow.
        progress: wraps the list of modules while it is worked through.

    Raises:
        UserError: for a broken checkpoint, a plan that does not fit it, too many shards, a model
            that does not fit into memory, a layer that needs a calibration and has none, or
            activations of 8 bits where no layer takes them.
    """
    weights = Weights(Checkpoint(folder))
    dtype = dtype or weights.dtype()
    specs = _specs(weights, plan)
    _check_calibration(weights, specs, calibration)
    model = _empty(weights, specs, dtype)
    config = model.config
    costs = _layer_bytes(model)
    model.shards = balance(costs, num_shards)
    largest = max(torch.Size(shape).numel() for shape in weights.shapes.values())
    needed = sum(costs) + largest * dtype.itemsize + KVCache.size(config, *cache_shape, dtype)
    check_fits(needed, device, f"the model at bitwidth {plan.text}")

    for name, module in progress(_leaves(model)):
        if isinstance(module, Linear):
            if name in weights.stored:
                _fill_stored(model, name, module, weights, device)
            else:
                _fill_linear(model, name, module, weights, specs, device, calibration)
        else:
            for key in dict(module.named_buffers(recurse=False)):
                setattr(module, key, _read(weights, f"{name}.{key}", dtype, device))
    if config.tied_head:
        model.lm_head = linear_class(QuantSpec()).from_float(model.embed.weight, None, QuantSpec())
    if activation_bits == 8:
        _round_activations(model)
    return model


def outline(folder: Path, plan: QuantPlan, dtype: torch.dtype | None = None) -> Decoder:
    """The model that `load_model` would make, on the meta device: files' headers alone are read.

    Raises:
        UserError: for a broken checkpoint, or a plan that does not fit it.
    """
    weights = Weights(Checkpoint(folder))
    return _empty(weights, _specs(weights, plan), dtype or weights.dtype())


def _empty(weights: Weights, specs: dict[str, QuantSpec], dtype: torch.dtype) -> Decoder:
    config = weights.config
    if LM_HEAD in specs:  # of a matrix that is tied, the embedding stays as it is
        config = replace(config, tied_head=False)
    return Decoder(config, specs, dtype)


def _round_activations(model: Decoder) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, WeightOnlyLinear)]
    if not layers:
        raise UserError(
            "activations of 8 bits are for layers of 1 to 8 bits, and this model has none; "
            "8:tc-li has them already"
        )
    for layer in layers:
        layer.round_activations()


def _specs(weights: Weights, plan: QuantPlan) -> dict[str, QuantSpec]:
    """The spec of every linear: of the plan, or as a quantized checkpoint has it."""
    config = weights.config
    if weights.stored:
        if any(spec.kind != "dense" for _, spec in plan.rules):
            raise UserError(
                f"{weights.checkpoint.folder} is quantized already, and runs as it is; "
                "leave --bitwidth and --lm-head-bits out"
            )
        return {name: storage.spec for name, storage in weights.stored.items()}
    specs = plan.resolve(weights.family.layer_linears(config.num_layers), config.num_layers)
    for spec in specs.values():
        if spec.algorithm != DEFAULT_ALGORITHM:
            raise UserError(
                f"{spec.algorithm} takes calibration and time: qllm_quant.py does it once, and "
                "what it saves is loaded; loading itself rounds to nearest (rtn)"
            )
    return specs


def _check_calibration(
    weights: Weights, specs: dict[str, QuantSpec], calibration: Calibration | None
) -> None:
    """Refuse int8 layers without the statistics they need, or with those of another model."""
    if weights.stored:
        return
    if calibration is None and any(spec.kind == "w8a8_static" for spec in specs.values()):
        raise UserError(
            "bitwidth 8:tc needs a calibration of this model's activations; make one with "
            "fake_calib_gen.py, name one with --calib, or use 8:tc-li, which needs none"
        )
    if calibration is not None:
        shapes = {name: weights.shapes[f"{name}.weight"] for name in specs if name != LM_HEAD}
        calibration.check(shapes)


def _fill_stored(model: Decoder, name: str, module: Linear, weights: Weights, device: str) -> None:
    """Put a linear that the checkpoint holds quantized in its place."""
    found = weights.read_quantized(name)
    bias = None
    if module.bias is not None:
        bias = _read(weights, f"{name}.bias", model.dtype, device)
    tensors = [None if tensor is None else tensor.to(device) for tensor in found]
    spec = weights.stored[name].spec
    if isinstance(found, Int8Weight):
        qweight, scales, input_scale = tensors
        extra = [] if input_scale is None else [input_scale]
        layer = linear_class(spec)(qweight, scales, bias, spec, *extra)
    else:
        spec = replace(spec, scheme="asym" if found.qzeros.numel() else "sym")
        packed = PackedWeight(*tensors)
        layer = WeightOnlyLinear.from_packed(packed, bias, spec, module.in_features)
    model.set_submodule(name, layer)


def _leaves(model: Decoder) -> list[tuple[str, nn.Module]]:
    """The modules that hold tensors, in the order of the checkpoint; a tied head holds none."""
    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear) or any(True for _ in module.buffers(recurse=False))
    ]
    return [leaf for leaf in leaves if leaf[0] != "lm_head" or not model.config.tied_head]


def _fill_linear(
    model: Decoder,
    name: str,
    module: Linear,
    weights: Weights,
    specs: dict[str, QuantSpec],
    device: str,
    calibration: Calibration | None,
) -> None:
    spec = specs.get(name, QuantSpec())
    if spec.kind == "dense":
        weight = _read(weights, f"{name}.weight", model.dtype, device)
    else:
        tied = name == LM_HEAD and weights.config.tied_head
        weight = weights.read("embed.weight" if tied else f"{name}.weight").to(device)
    bias = None
    if module.bias is not None:
        bias = _read(weights, f"{name}.bias", model.dtype, device)
    input_range = None
    if calibration is not None and spec.kind.startswith("w8a8") and name in calibration.inputs:
        inputs = calibration.inputs[name].to(device)
        index, _, inner = name.removeprefix("layers.").partition(".")
        # A linear in front is quantized already: here norms alone take the smoothing.
        if inner in NORMS and can_divide(model.config, inner):
            scales = smooth_scales(inputs, weight)
            weight, inputs = weight.float() * scales, inputs / scales
            divide_rows(model.get_submodule(f"layers.{index}.{NORMS[inner]}"), slice(None), scales)
        input_range = float(inputs.max())
    layer = linear_class(spec).from_float(weight, bias, spec, input_range=input_range)
    model.set_submodule(name, layer)


def _read(weights: Weights, name: str, dtype: torch.dtype, device: str) -> Tensor:
    """A tensor that the model keeps as it is: mapped where it needs no conversion."""
    tensor = weights.read(name, mapped=device == "cpu" and weights.dtype() == dtype)
    converted = tensor.to(device=device, dtype=dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not converted.isfinite().all():
        raise UserError(f"{name} holds values beyond {dtype}; use --dtype bfloat16 or float32")
    return converted


def _layer_bytes(model: Decoder) -> list[int]:
    """Bytes of each layer, what is in front of the layers and behind them counted with an end."""
    costs = [module_bytes(layer) for layer in model.layers]
    for name, module in model.named_children():
        if name in ("embed", "embed_norm", "project_in", "positions"):
            costs[0] += module_bytes(module)
        elif name in ("final_norm", "project_out", "lm_head"):
            tied = name == "lm_head" and model.config.tied_head
            costs[-1] += 0 if tied else module_bytes(module)
    return costs


def module_bytes(module: nn.Module) -> int:
    """Bytes of the tensors below a module."""
    return sum(tensor.nbytes for tensor in module.buffers())


def shard_bytes(model: Decoder) -> list[int]:
    """Bytes that each shard holds; a head tied to the embedding counts once, with the first."""
    costs = _layer_bytes(model)
    return [sum(costs[i] for i in shard) for shard in model.shards]
