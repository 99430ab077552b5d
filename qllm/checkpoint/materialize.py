"""Materialize modules that are on the meta device: each gets its tensors, as its spec says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qllm.calibration import Calibration
from qllm.checkpoint.formats import Int8Weight
from qllm.checkpoint.weights import Weights
from qllm.config import LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear, linear_class
from qllm.layers.base import QuantizedLinear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder
from qllm.models.equalize import NORMS, can_divide
from qllm.parallel.group import Group
from qllm.parallel.layers import VocabularyParallel, parallel
from qllm.parallel.plan import Sharding, model_shardings, shard_heads
from qllm.quant.packing import PackedWeight, group_width
from qllm.quant.smooth import smooth_scales


@dataclass
class Materializer:
    """Gives a model's modules their tensors, of each the shard that this process has.

    Attributes:
        device: of the module that is being materialized.
    """

    model: Decoder
    weights: Weights
    specs: dict[str, QuantSpec]
    dtype: torch.dtype
    calibration: Calibration | None
    activation_bits: int
    tp: Group
    mode: str

    def __post_init__(self) -> None:
        shared = self.tp.size > 1
        self.shardings = (
            model_shardings(self.model.config, self.tp.size, self.mode) if shared else {}
        )

    def materialize(self, name: str, module: nn.Module) -> None:
        """Give a module its tensors."""
        sharding, self.device = self._sharding(name), self._device_of(name)
        if not isinstance(module, Linear):
            rows = sharding and sharding.ranges[self.tp.rank]
            for key in dict(module.named_buffers(recurse=False)):
                tensor = self._read(f"{name}.{key}", rows)
                if sharding:
                    self.model.set_submodule(name, VocabularyParallel(tensor, self.tp, sharding))
                else:
                    setattr(module, key, tensor)
            return
        if name in self.weights.stored:
            layer, bias = self._stored(name, module, sharding)
        else:
            layer, bias = self._quantized(name, module, sharding)
        self._put(name, layer, sharding, bias)

    def finish(self) -> None:
        """Tie the head, and tell the rest of the model which heads are here."""
        model, tp, self.device = self.model, self.tp, self._device_of(LM_HEAD)
        last = model.stage is None or model.stage.last
        if model.config.tied_head and last:
            if model.embed.weight.is_meta:
                sharding = self._sharding(LM_HEAD)
                weight = self._read("embed.weight", sharding and sharding.ranges[tp.rank])
            else:
                weight = model.embed.weight.to(self.device)
            head = linear_class(QuantSpec()).from_float(weight, None, QuantSpec())
            self._put(LM_HEAD, head, self._sharding(LM_HEAD), None)
        for layer in model.layers:
            layer.fuse_norms()
        if not self.shardings:
            return
        config = model.config
        heads = shard_heads(config.num_heads, config.num_kv_heads, tp.size)[tp.rank]
        model.kv_heads = len(heads.keys)
        for layer in model.layers:
            layer.attention.heads = [len(heads.queries), len(heads.keys), len(heads.keys)]
        if model.positions.slopes is not None:
            queries = heads.queries
            model.positions.slopes = model.positions.slopes[queries.start : queries.stop].clone()

    def _device_of(self, name: str) -> torch.device:
        """The device of a module."""
        model = self.model
        if not name.startswith("layers."):
            front = name in ("embed", "embed_norm", "project_in", "positions")
            return model.device_map[0 if front else -1]
        index = int(name.split(".")[1])
        devices = zip(model.shards, model.device_map, strict=True)
        return next(device for shard, device in devices if index in shard)

    def _sharding(self, name: str) -> Sharding | None:
        """How a module is sharded over the ranks; None: each has all of it."""
        return self.shardings.get(_inner(name))

    def _put(
        self, name: str, layer: Linear, sharding: Sharding | None, bias: Tensor | None
    ) -> None:
        if self.activation_bits == 8 and isinstance(layer, WeightOnlyLinear):
            layer.round_activations()
        if isinstance(layer, QuantizedLinear):
            layer.settle()  # here, and not all together later, the two forms need little room
        if sharding:
            inner = _inner(name)
            first = {"attention.out": "attention.qkv", "mlp.down": "mlp.up"}.get(inner)
            inputs = first and [len(runs[0]) for runs in self.shardings[first].ranges]
            gather = inner not in ("attention.qkv", "mlp.up")
            layer = parallel(layer, self.tp, sharding, inputs=inputs, bias=bias, gather=gather)
        self.model.set_submodule(name, layer)

    def _stored(
        self, name: str, module: Linear, sharding: Sharding | None
    ) -> tuple[Linear, Tensor | None]:
        """A linear that is stored quantized, and the bias of one that is cut by input channels."""
        rows = sharding.ranges[self.tp.rank] if sharding and sharding.dim == 0 else None
        found = self.weights.read_quantized(name, rows)
        bias = None if module.bias is None else self._read(f"{name}.bias", rows)
        tensors = [None if tensor is None else tensor.to(self.device) for tensor in found]
        spec = self.weights.stored[name].spec
        if isinstance(found, Int8Weight):
            qweight, scales, input_scale = tensors
            extra = [] if input_scale is None else [input_scale]
            layer = linear_class(spec)(qweight, scales, bias, spec, *extra)
        else:
            spec = replace(spec, scheme="asym" if found.qzeros.numel() else "sym")
            packed = PackedWeight(*tensors)
            layer = WeightOnlyLinear.from_packed(packed, bias, spec, module.in_features)
        if sharding and sharding.dim == 1:
            layer = layer.narrow(1, *sharding.ranges[self.tp.rank])
        return layer, bias

    def _quantized(
        self, name: str, module: Linear, sharding: Sharding | None
    ) -> tuple[Linear, Tensor | None]:
        """A linear of float weights as its spec says, and the bias as in `_stored`.

        The shard is read, and where it begins or ends inside a group, the rest of the group with
        it: so its integers are those of the whole matrix.
        """
        spec = self.specs.get(name, QuantSpec())
        runs = sharding.ranges[self.tp.rank] if sharding else None
        rows, columns = (runs, None) if sharding and sharding.dim == 0 else (None, None)
        kept = None
        if sharding and sharding.dim == 1:
            (run,) = runs
            columns = _whole_groups(run, spec, module.in_features)
            kept = range(run.start - columns.start, run.stop - columns.start)
        bias = None if module.bias is None else self._read(f"{name}.bias", rows)
        source = f"{name}.weight"
        if name == LM_HEAD and self.weights.config.tied_head and spec.kind != "dense":
            source = "embed.weight"
        if spec.kind == "dense":
            weight = self._read(source, rows, columns)
        else:
            weight = self.weights.read(source, rows=rows, columns=columns).to(self.device)
        whole = weight if sharding is None else None
        input_range, scales = self._smoothing(name, source, spec, whole)
        if scales is not None:
            weight = weight.float() * scales
        layer = linear_class(spec).from_float(
            weight, bias, spec, input_range=input_range, together=self.tp.all_true
        )
        if kept is not None and (spec.kind != "dense"):
            layer = layer.narrow(1, kept)
        elif kept is not None:
            layer.bias = None
        return layer, bias

    def _smoothing(
        self, name: str, source: str, spec: QuantSpec, whole: Tensor | None
    ) -> tuple[float | None, Tensor | None]:
        """The range of a W8A8 layer's inputs, and by what its input channels are multiplied.

        Args:
            whole: the layer's weight; None where only a shard of it has been read.
        """
        calibration = self.calibration
        if calibration is None or not spec.kind.startswith("w8a8"):
            return None, None
        if name not in calibration.inputs:
            return None, None
        inputs, scales = calibration.inputs[name].to(self.device), None
        index, _, inner = name.removeprefix("layers.").partition(".")
        # A linear in front is quantized already: here norms alone take the smoothing.
        if inner in NORMS and can_divide(self.model.config, inner):
            # Of all rows, whichever are kept: every rank divides the norm by the same.
            if whole is None:
                whole = self.weights.read(source).to(self.device)
            scales = smooth_scales(inputs, whole)
            inputs = inputs / scales
            norm = self.model.get_submodule(f"layers.{index}.{NORMS[inner]}")
            norm.divide(scales)
        return float(inputs.max()), scales

    def _read(
        self, name: str, rows: Sequence[range] | None = None, columns: range | None = None
    ) -> Tensor:
        """A tensor that the model keeps as it is: mapped where it needs no conversion."""
        device, dtype = self.device, self.dtype
        mapped = device.type == "cpu" and self.weights.dtype() == dtype
        tensor = self.weights.read(name, mapped=mapped, rows=rows, columns=columns)
        converted = tensor.to(device=device, dtype=dtype)
        narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
        if narrower and not converted.isfinite().all():
            raise UserError(f"{name} holds values beyond {dtype}; use --dtype bfloat16 or float32")
        return converted


def _inner(name: str) -> str:
    """A module's name without its layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _whole_groups(columns: range, spec: QuantSpec, in_features: int) -> range:
    """The input channels of the groups that some channels are in."""
    if spec.kind == "dense":
        return columns
    group = group_width(in_features, spec.group_size)
    stop = min(in_features, -(-columns.stop // group) * group)
    return range(columns.start // group * group, stop)
