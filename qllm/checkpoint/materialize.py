"""Materialize modules that are on the meta device: each gets its tensors, as its spec says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qllm.calibration import Calibration
from qllm.checkpoint.formats import Int8Weight
from qllm.checkpoint.tensors import is_finite
from qllm.checkpoint.weights import Weights
from qllm.config import EMBEDDING, LM_HEAD, QuantSpec
from qllm.errors import UserError
from qllm.layers import Linear, linear_class
from qllm.layers.fp16 import DenseLinear
from qllm.layers.w8a8 import DynamicInt8Linear, StaticInt8Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder
from qllm.models.attention import Sinks
from qllm.models.delta_net import CausalConv, HeadValues
from qllm.models.embeddings import Embedding, QuantizedEmbedding
from qllm.models.equalize import NORMS, can_divide
from qllm.models.norms import Norm
from qllm.parallel.layers import (
    QuantizedVocabularyParallel,
    RowParallel,
    ShardedLinear,
    VocabularyParallel,
)
from qllm.quant.packing import PackedWeight, scheme_of
from qllm.quant.smooth import smooth_scales

# Modules that are no linears, of which a rank may have some rows.
SHARDED = (VocabularyParallel, Sinks, CausalConv, HeadValues)


@dataclass
class Materializer:
    """Gives a model's modules their tensors, of each the shard that this process has.

    Attributes:
        device: of the module that is being materialized.
    """

    model: Decoder
    weights: Weights
    specs: dict[str, QuantSpec]
    calibration: Calibration | None
    activation_bits: int

    def __post_init__(self) -> None:
        model = self.model
        self.tp, self.dtype, self.device = model.parallel.tp, model.dtype, model.device
        outer = isinstance(model.embed, nn.Identity) or isinstance(model.lm_head, nn.Identity)
        self.ties = model.config.tied_head and not outer

    def leaves(self) -> list[tuple[str, nn.Module]]:
        """The modules that hold tensors, in the order of the checkpoint; a tied head holds none."""
        return [leaf for leaf in _leaves("", self.model) if leaf[0] != LM_HEAD or not self.ties]

    def materialize(self, name: str, module: nn.Module) -> None:
        """Give a module its tensors."""
        self.device = self._device_of(name)
        if isinstance(module, ShardedLinear):
            module.linear, bias = self._linear(name, module)
            if isinstance(module, RowParallel):
                module.bias = bias
        elif isinstance(module, Linear):
            self.model.set_submodule(name, self._linear(name)[0])
        elif isinstance(module, QuantizedEmbedding):
            linear = self._linear(name)[0]
            assert isinstance(linear, WeightOnlyLinear)
            module.linear = linear
        else:
            rows = module.ranges if isinstance(module, SHARDED) else None
            for key in dict(module.named_buffers(recurse=False)):
                setattr(module, key, self._read(f"{name}.{key}", rows))

    def finish(self) -> None:
        """Tie the head to the embedding."""
        model = self.model
        if self.ties:
            device, embed = self._device_of(LM_HEAD), model.embed
            head: Linear
            if isinstance(embed, QuantizedEmbedding | QuantizedVocabularyParallel):
                head = embed.linear
                if next(head.buffers()).device != device:
                    head = head.narrow(0, range(head.out_features)).to(device)
                    head.process_weights_after_loading()
            else:
                assert isinstance(embed, Embedding | VocabularyParallel)  # of all that tie
                head = DenseLinear(embed.weight.to(device), None, QuantSpec())
            if isinstance(model.lm_head, ShardedLinear):
                model.lm_head.linear = head
            else:
                model.lm_head = head

    @staticmethod
    def layer_of(name: str) -> int | None:
        """The layer that a module is in; None: it is in none."""
        return int(name.split(".")[1]) if name.startswith("layers.") else None

    def _device_of(self, name: str) -> torch.device:
        """The device of a module."""
        index = self.layer_of(name)
        if index is not None:
            return self.model.device_of_layer(index)
        fronts = ("embed", "embed_norm", "project_in", "positions", "layer_inputs")
        front = name.partition(".")[0] in fronts
        return list(self.model.device_map.values())[0 if front else -1]

    def _linear(
        self, name: str, sharded: ShardedLinear | None = None
    ) -> tuple[Linear, Tensor | None]:
        """A linear or the shard of one, and the bias, which a shard of input channels lacks."""
        rows = sharded.ranges if sharded and sharded.sharding.dim == 0 else None
        bias = None
        if f"{name}.bias" in self.weights.shapes:
            bias = self._read(f"{name}.bias", rows)
        matrix = self._matrix_of(name)
        make = self._stored if matrix in self.weights.stored else self._quantized
        layer = make(matrix, bias, sharded)
        if self.activation_bits == 8 and isinstance(layer, WeightOnlyLinear):
            layer.round_activations()
        # Here, and not all together later, the two layouts need little memory.
        layer.process_weights_after_loading()
        return layer, bias

    def _matrix_of(self, name: str) -> str:
        """The module whose matrix a linear has: a head that is tied to a packed embedding has its.

        Where both are in one process, the head is what that has; see `finish`.
        """
        tied = name == LM_HEAD and self.weights.config.tied_head and name not in self.specs
        return EMBEDDING if tied and EMBEDDING in self.specs else name

    def _stored(self, name: str, bias: Tensor | None, sharded: ShardedLinear | None) -> Linear:
        """A linear that is stored quantized."""
        rows = sharded.ranges if sharded and sharded.sharding.dim == 0 else None
        found = self.weights.read_quantized(name, rows)
        spec, device = self.weights.stored[name].spec, self.device
        layer: Linear
        if isinstance(found, Int8Weight):
            qweight, scales = found.qweight.to(device), found.scales.to(device)
            if found.input_scale is None:
                layer = DynamicInt8Linear(qweight, scales, bias, spec)
            else:
                input_scale = found.input_scale.to(device)
                layer = StaticInt8Linear(qweight, scales, bias, spec, input_scale)
        else:
            spec = replace(spec, scheme=scheme_of(found.qzeros))
            columns = self.weights.shapes[f"{name}.weight"][1]
            packed = PackedWeight(
                found.qweight.to(device),
                found.scales.to(device),
                found.qzeros.to(device),
                None if found.perm is None else found.perm.to(device),
            )
            layer = WeightOnlyLinear.from_packed(packed, bias, spec, columns)
        return layer if rows or not sharded else layer.shard(sharded.sharding, self.tp.rank)

    def _quantized(self, name: str, bias: Tensor | None, sharded: ShardedLinear | None) -> Linear:
        """A linear of float weights, quantized as its spec says.

        Of a shard of input channels what its layer asks for is read: with the rest of the groups
        in which it begins and ends, its integers are those of the whole matrix.
        """
        spec = self.specs.get(name, QuantSpec())
        kind, source = linear_class(spec), f"{name}.weight"
        if name == LM_HEAD and self.weights.config.tied_head:
            source = "embed.weight"
        rows = wanted = columns = None
        if sharded and sharded.sharding.dim == 0:
            rows = sharded.ranges
        elif sharded:
            (wanted,) = sharded.ranges
            columns = kind.columns_to_read(wanted, spec, self.weights.shapes[source][1])
            bias = None
        if spec.kind == "dense":
            weight = self._read(source, rows, columns)
        else:
            weight = self.weights.read(source, rows=rows, columns=columns).to(self.device)
        input_range, scales = self._smoothing(name, source, spec, None if sharded else weight)
        if scales is not None:
            weight = weight.float() * scales
        layer = kind.from_float(
            weight, bias, spec, input_range=input_range, all_fit=self.tp.all_true
        )
        if wanted is None or columns is None or columns == wanted:
            return layer
        return layer.narrow(1, range(wanted.start - columns.start, wanted.stop - columns.start))

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
            assert isinstance(norm, Norm)
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
        if narrower and not is_finite(converted):
            raise UserError(f"{name} holds values beyond {dtype}; use `dtype` bfloat16 or float32")
        return converted


def _leaves(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold tensors, below one: a function of its own, since one within a function,
    that calls itself, would hold what it found until Python looks for cycles."""
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        buffers = any(True for _ in child.buffers(recurse=False))
        if isinstance(child, Linear | ShardedLinear | QuantizedEmbedding) or buffers:
            yield name, child
        else:
            yield from _leaves(f"{name}.", child)
