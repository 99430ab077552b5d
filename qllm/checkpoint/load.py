"""Build a model on the meta device and fill it, one module after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from qllm import ops
from qllm.calibration import Calibration
from qllm.checkpoint.device_map import infer_device_map
from qllm.checkpoint.formats.floats import HELD_GROUPS
from qllm.checkpoint.materialize import Materializer
from qllm.checkpoint.reader import Checkpoint, read_raw_config
from qllm.checkpoint.rehearsal import Rehearsal
from qllm.checkpoint.weights import Weights, config_dtype
from qllm.config import (
    ACTIVATION_BITS,
    DEFAULT_ACTIVATION_BITS,
    DEFAULT_ALGORITHM,
    DEFAULT_KV_BITS,
    EMBEDDING,
    KV_BITS,
    LM_HEAD,
    ModelConfig,
    QuantPlan,
    QuantSpec,
)
from qllm.errors import UserError
from qllm.gguf import is_gguf
from qllm.layers import Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.memory import gigabytes
from qllm.models import Decoder
from qllm.models.cache import KVCache
from qllm.models.mlp import is_of_expert
from qllm.parallel.pipeline import ParallelContext, balance
from qllm.progress import Meter, Note, silent, unseen
from qllm.quant.packing import packed_size


def load_model(
    folder: Path,
    plan: QuantPlan,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    num_shards: int = 1,
    calibration: Calibration | None = None,
    cache_shape: tuple[int, int] = (0, 0),
    prompt_lengths: Sequence[int] = (),
    kv_bits: int = DEFAULT_KV_BITS,
    activation_bits: int = DEFAULT_ACTIVATION_BITS,
    meter: Meter = unseen,
    parallel: ParallelContext | None = None,
    note: Note = silent,
) -> Decoder:
    """Load a 16- or 32-bit checkpoint, quantizing each layer as it comes; or a quantized one.

    Args:
        folder: a checkpoint of a known family, in Hugging Face's or QLLM's layout.
        plan: which layer gets which spec; one that `keeps_stored` for a checkpoint that is
            quantized already.
        dtype: of activations and dense weights; None is the checkpoint's.
        device: where the model goes; of one that is too large for it in several shards, the first
            shards. The others then go to the CPU.
        num_shards: contiguous layer ranges of about equal bytes, run one after the other.
        calibration: activation ranges, for W8A8 layers.
        cache_shape: rows and tokens of the KV cache that must fit beside the model.
        prompt_lengths: tokens of each of the prompts that come first, for which kernels are
            compiled while weights are read.
        kv_bits: of the keys and values in it, one of KV_BITS.
        activation_bits: 8: layers of 1 to 8 bits multiply activations as int8, one scale per 128
            inputs; 16: as exactly as 16-bit types allow.
        meter: counts the bytes that the linears' weights have in `dtype`.
        parallel: which part of the model this process of several has; None: all of it.
        note: called with a line on what the checkpoint holds and the model does not use.

    Raises:
        UserError: for a broken checkpoint, a plan that does not fit it, too many shards, a model
            that does not fit into memory with its cache, a layer that needs a calibration and has
            none, or activations of 8 bits where no layer takes them.
    """
    for name, bits, known in (
        ("kv_bits", kv_bits, KV_BITS),
        ("activation_bits", activation_bits, ACTIVATION_BITS),
    ):
        if bits not in known:
            raise UserError(f"{name} is {bits!r}; give one of {', '.join(map(str, known))}")
    weights = Weights(_open(folder, plan, dtype), note)
    dtype = dtype or weights.default_dtype()
    specs = _specs(weights, plan)
    _note_unpacked(weights.checkpoint, plan, note)
    _check_calibration(weights, specs, calibration)
    whole = _empty(weights, specs, dtype)
    if activation_bits == 8:
        _check_takes_int8([whole])
    parallel = parallel or ParallelContext()
    if torch.device(device).type == "cpu":
        _take_held_bits(whole, weights)
    costs = _layer_bytes(whole)
    if parallel.stage is not None and whole.config.tied_head:
        costs[-1] += module_bytes(whole.embed)  # the last stage has it, too
    halves = _halves(whole.config, parallel, costs)
    shards = _shards(halves, costs, num_shards if parallel.stage is None else 1)
    largest = max(torch.Size(shape).numel() for shape in weights.shapes.values())
    caches = KVCache.sizes(whole.config, *cache_shape, dtype, kv_bits)
    sizes = [sum(costs[i] + caches[i] for i in shard) // parallel.tp.size for shard in shards]
    what = "the model" if weights.stored else f"the model at bitwidth {plan.text}"
    if any(caches):
        in_all = gigabytes(sum(caches) // parallel.tp.size)
        what += f" with a KV cache of {in_all} ({cache_shape[0]} x {cache_shape[1]} tokens)"
    devices = infer_device_map(sizes, largest * dtype.itemsize, device, what)
    model = Decoder(
        whole.config,
        specs,
        dtype,
        parallel=parallel,
        halves=halves,
        device_map=dict(zip(shards, devices, strict=True)),
    )
    model.kv_bits = kv_bits
    materializer = Materializer(model, weights, specs, calibration, activation_bits)
    _fill(materializer, meter, prompt_lengths, cache_shape)
    return model


def _note_unpacked(checkpoint: Checkpoint, plan: QuantPlan, note: Note) -> None:
    if checkpoint.unpacked_types and (plan.keeps_stored or plan.outer_alone):
        reason = "other parts of them (q, k, v; gate, up) are plain numbers"
        rounds = "`bitwidth` rounds the numbers of all layers"
        if checkpoint.floats.found:
            reason = "layers compute with no smaller floats"
            rounds += ", and `embedding_bits` those of the embedding"
        note(
            f"matrices of {', '.join(checkpoint.unpacked_types)} are held at 16 bits: {reason}; "
            f"{rounds}"
        )


def _halves(config: ModelConfig, parallel: ParallelContext, costs: Sequence[int]) -> range:
    """The halves of layers that this process's stage of a pipeline has.

    Raises:
        UserError: for a cut inside a layer that cannot be cut.
    """
    halves = parallel.halves(costs)
    if config.parallel_blocks and (halves.start % 2 or halves.stop % 2):
        raise UserError(
            "attention and MLP of a layer take the same input in this model: a stage begins with a "
            "whole layer"
        )
    return halves


def _shards(halves: range, costs: Sequence[int], count: int) -> list[range]:
    """Contiguous ranges of the layers of a stage, of about equal bytes."""
    layers = range(halves.start // 2, (halves.stop + 1) // 2)
    parts = balance([costs[i] for i in layers], count)
    return [range(layers[part.start], layers[part.stop - 1] + 1) for part in parts]


def _fill(
    materializer: Materializer,
    meter: Meter,
    prompt_lengths: Sequence[int],
    cache_shape: tuple[int, int],
) -> None:
    """Read all weights, while kernels for the first prompts are compiled."""
    model, leaves = materializer.model, materializer.leaves()
    sizes = [elements(module) * model.dtype.itemsize for _, module in leaves]
    device_types = {device.type for device in model.device_map.values()}
    for device_type in device_types:
        ops.prepare(device_type)  # what is compiled must not count as loading
    last = {materializer.layer_of(name): name for name, _ in leaves}
    with meter(sum(sizes), 0) as add, Rehearsal(model, prompt_lengths, cache_shape) as rehearsal:
        for (name, module), size in zip(leaves, sizes, strict=True):
            materializer.materialize(name, module)
            add(size)
            index = materializer.layer_of(name)
            if index is not None and last[index] == name:
                model.layers[index].fuse_norms()
                rehearsal.layer(index)
        materializer.finish()
    for device_type in device_types:
        ops.keep_freed_memory(device_type)


def outline(folder: Path, plan: QuantPlan, dtype: torch.dtype | None = None) -> Decoder:
    """The model that `load_model` would make, on the meta device: files' headers alone are read.

    Raises:
        UserError: for a broken checkpoint, or a plan that does not fit it.
    """
    weights = Weights(_open(folder, plan, dtype))
    return _empty(weights, _specs(weights, plan), dtype or weights.default_dtype())


def _open(folder: Path, plan: QuantPlan, dtype: torch.dtype | None) -> Checkpoint:
    """A checkpoint; what a plan asks of a GGUF file is made of its numbers, whatever their type.

    Where nothing is quantized they, and small floats, are read in the type that the model will
    have, None being the file's own. Of embedding and LM head alone, all else is as the file has it.
    """
    own = torch.float32
    if not plan.quantizes:
        own = dtype or config_dtype(read_raw_config(folder)) or own
    if not is_gguf(folder):
        return Checkpoint(folder, dtype=own, packed_floats=HELD_GROUPS if plan.keeps_stored else ())
    packed = plan.keeps_stored or bool(plan.outer_alone)
    return Checkpoint(folder, packed=packed, dtype=own, as_numbers=plan.outer_alone)


def _empty(weights: Weights, specs: dict[str, QuantSpec], dtype: torch.dtype) -> Decoder:
    config = weights.config
    if LM_HEAD in specs:  # of a matrix that is tied, the embedding stays as it is
        config = replace(config, tied_head=False)
    return Decoder(config, specs, dtype)


def _take_held_bits(model: Decoder, weights: Weights) -> None:
    """Give a model on the meta device the bytes that CPU kernels hold of stored integers."""
    for name, layer in model.named_modules():
        stored = weights.stored.get(name.removesuffix(".linear"))
        if not stored or not isinstance(layer, WeightOnlyLinear):
            continue
        fewer = stored.held_bits < layer.spec.bits
        if fewer and ops.select(layer.op, replace(layer.request, device="cpu")).kernel.layout:
            size = packed_size(layer.in_features, stored.held_bits)
            layer.qweight = layer.qweight.new_empty(layer.out_features, size)


def activation_bits(folder: Path, plans: Sequence[QuantPlan], wanted: int) -> list[int]:
    """The `activation_bits` with which each plan's model is loaded: 8 where it has layers for it.

    Raises:
        UserError: 8 are wanted, and no model has; or as `outline`.
    """
    models = [outline(folder, plan) for plan in plans]
    if wanted == 8:
        _check_takes_int8(models)
    return [wanted if any(_weight_only(model)) else DEFAULT_ACTIVATION_BITS for model in models]


def _check_takes_int8(models: Sequence[Decoder]) -> None:
    if not any(layer for model in models for layer in _weight_only(model)):
        raise UserError(
            "activations of 8 bits are for layers of 1 to 8 bits, and there are none; "
            "8:tc-li has them already"
        )


def _weight_only(model: Decoder) -> Iterator[WeightOnlyLinear]:
    """Those that multiply: an embedding alone is looked up."""
    found = (layer for layer in model.modules() if isinstance(layer, WeightOnlyLinear))
    table = getattr(model.embed, "linear", None)
    return (layer for layer in found if layer is not table or layer is model.lm_head)


def _specs(weights: Weights, plan: QuantPlan) -> dict[str, QuantSpec]:
    """The spec of every linear: of the plan, or as a quantized checkpoint has it."""
    config = weights.config
    stored = {name: storage.spec for name, storage in weights.stored.items()}
    if stored and plan.keeps_stored:
        return stored
    if stored and not is_gguf(weights.checkpoint.folder):
        raise UserError(
            f"{weights.checkpoint.folder} is quantized already, and runs as it is; "
            "leave `bitwidth`, `lm_head_bits` and `embedding_bits` out"
        )
    plan.check(config)
    linears = weights.family.layer_linears(config)
    specs = plan.resolve(linears, config.num_layers, tied=config.tied_head)
    for spec in specs.values():
        if spec.algorithm != DEFAULT_ALGORITHM:
            raise UserError(
                f"{spec.algorithm} takes calibration and time: qllm_quant.py does it once, and "
                "what it saves is loaded; loading itself rounds to nearest (rtn)"
            )
    return specs | stored


def _check_calibration(
    weights: Weights, specs: dict[str, QuantSpec], calibration: Calibration | None
) -> None:
    """Refuse int8 layers without the statistics they need, or with those of another model."""
    rounded = {name: spec for name, spec in specs.items() if name not in weights.stored}
    if calibration is None and any(spec.kind == "w8a8_static" for spec in rounded.values()):
        raise UserError(
            "bitwidth 8:tc needs a calibration of this model's activations; make one with "
            "fake_calib_gen.py, name one with `calibration`, or use 8:tc-li, which needs none"
        )
    if calibration is not None:
        shapes = {
            name: weights.shapes[f"{name}.weight"]
            for name in rounded
            if name not in (EMBEDDING, LM_HEAD)
        }
        calibration.check(shapes)
        for name in shapes:
            static = rounded[name].kind == "w8a8_static"
            if static and is_of_expert(name) and not calibration.inputs[name].any():
                raise UserError(
                    f"no token of the calibration reached {name}: the range of its inputs is not "
                    "known; take more text, or bitwidth 8:tc-li"
                )


def _layer_bytes(model: Decoder) -> list[int]:
    """Bytes of each layer, what is in front of the layers and behind them counted with an end."""
    costs = [module_bytes(layer) for layer in model.layers]
    for name, module in model.named_children():
        if name in ("embed", "embed_norm", "project_in", "positions", "layer_inputs"):
            costs[0] += module_bytes(module)
        elif name in ("final_norm", "project_out", "lm_head"):
            tied = name == "lm_head" and model.config.tied_head
            costs[-1] += 0 if tied else module_bytes(module)
    return costs


def module_bytes(module: nn.Module) -> int:
    """Bytes of the tensors below a module."""
    return sum(tensor.nbytes for tensor in module.buffers())


def elements(module: nn.Module) -> int:
    """Elements of the matrices of the linears in a module; all else takes next to no time."""
    linears = (inner for inner in module.modules() if isinstance(inner, Linear))
    return sum(linear.in_features * linear.out_features for linear in linears)


def shard_bytes(model: Decoder) -> list[int]:
    """Bytes that each shard holds; a head tied to the embedding counts once, with the first."""
    costs = _layer_bytes(model)
    return [sum(costs[i] for i in layers) for layers in model.device_map]
