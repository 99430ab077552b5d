"""One layer of a decoder of any family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import ModelConfig
from qllm.layers import DynamicInt8Linear
from qllm.models.attention import ATTENTION_LINEARS, Attention, MakeLinear
from qllm.models.delta_net import make_mixer
from qllm.models.mlp import MLP, make_mlp, mlp_linears
from qllm.models.norms import NORMS, NoNorm, Norm, add
from qllm.models.passes import Decode, Prefill
from qllm.ops.reference import Int8Rows

Block = Callable[[Tensor, "Prefill | Decode"], Tensor]


def total(x: Tensor, z: Tensor | None) -> Tensor:
    """x + z, or x."""
    return x if z is None else add(x, z)


class PreNormLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
        has_attention, has_mlp: False for a half that another stage of a pipeline has.
        mlp_linears: names of the linears of the MLP, or of the experts in its place.
        blocks_end_in_sums: what `attention.out` and `mlp.down` put out is added to the rest of what
            their blocks do, times `output_scale`.
        adds_up_late: `parts` leaves the last sum to the norm of the layer behind.
    """

    has_attention = has_mlp = True
    blocks_end_in_sums = adds_up_late = True
    output_scale = 1.0
    attention_norm: Norm | NoNorm
    mlp_norm: Norm | NoNorm

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__()
        config = config.of_layer(index)
        norm = NORMS[config.norm]
        self.attention_norm = norm(config, dtype)
        self.attention = make_mixer(config, index, dtype, make)
        self.mlp_norm = norm(config, dtype)
        self.mlp = make_mlp(config, index, dtype, make)
        self.mlp_linears = mlp_linears(config, index)

    def forward(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        if self.has_attention and self.has_mlp:
            return self.both_blocks(x, step)
        if self.has_attention:
            return self.attention_block(x, step)
        return self.mlp_block(step.select(x))

    def blocks(self) -> tuple[tuple[Block, tuple[str, ...]], ...]:
        """What the layer is one after the other, and the linears in each, as they run."""
        return (
            (self.attention_block, ATTENTION_LINEARS),
            (lambda x, step: self.mlp_block(x), self.mlp_linears),
        )

    def parts(
        self, x: Tensor, z: Tensor | None, step: Prefill | Decode
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output for x + z (N, C), or for x, as two terms, or as one and None.

        Where the device adds up in front of a norm, the sum between two layers is no launch.
        """
        if not (self.adds_up_late and self.has_attention and self.has_mlp):
            return self(total(x, z), step), None
        if z is None:
            normed = self.attention_norm(x)
        else:
            x, normed = self.attention_norm.after_sum(x, z)
        x, normed = self.mlp_norm.after_sum(step.select(x), self._attended(normed, step))
        return x, self._through_mlp(normed)

    def both_blocks(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        """The whole layer: x (N, C) to (N, C), or to those of the tokens that are asked for."""
        return total(*self.parts(x, None, step))

    def attention_block(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        """The first half of the layer: x (N, C) to (N, C)."""
        return add(step.select(x), self._attended(self.attention_norm(x), step))

    def mlp_block(self, x: Tensor) -> Tensor:
        """The second half of the layer: x (N, C) to (N, C)."""
        return add(x, self._through_mlp(self.mlp_norm(x)))

    def _attended(self, normed: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        """What attention adds to the rows of which these are the norms, where it is asked for."""
        return self.attention(normed, step)

    def _through_mlp(self, normed: Tensor | Int8Rows) -> Tensor:
        """What the MLP adds to the rows of which these are the norms."""
        return self.mlp(normed)

    def fuse_norms(self) -> None:
        """Let norms make int8 of their results, where a linear that gains by it alone has them."""
        pairs = []
        # A delta net has two linears behind the norm.
        if self.has_attention and isinstance(self.attention, Attention):
            pairs.append(("attention_norm", self.attention.qkv))
        if self.has_mlp and isinstance(self.mlp, MLP):  # of experts none takes all rows
            pairs.append(("mlp_norm", self.mlp.up))
        for name, linear in pairs:
            if isinstance(linear, DynamicInt8Linear) and linear.choice.kernel.takes_rows:
                getattr(self, name).round_for(linear)


class LayerList(nn.ModuleList):
    """The layers of a decoder, in the order in which they run."""

    if TYPE_CHECKING:  # torch knows no more of a list than that it has modules

        @overload
        def __getitem__(self, idx: slice) -> LayerList: ...

        @overload
        def __getitem__(self, idx: int) -> PreNormLayer: ...

        def __getitem__(self, idx: int | slice) -> PreNormLayer | LayerList: ...

        def __iter__(self) -> Iterator[PreNormLayer]: ...


class OutputNormLayer(PreNormLayer):
    """A pre-norm layer that norms what attention and MLP add as well: Gemma 2 and 3."""

    blocks_end_in_sums = False

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        norm = NORMS[config.norm]
        self.attention_output_norm = norm(config, dtype)
        self.mlp_output_norm = norm(config, dtype)

    def _attended(self, normed: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        return self.attention_output_norm(super()._attended(normed, step))

    def _through_mlp(self, normed: Tensor | Int8Rows) -> Tensor:
        return self.mlp_output_norm(super()._through_mlp(normed))


class LayerScale(nn.Module):
    """x times a number that a checkpoint has: weight (1,)."""

    weight: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(1, dtype=dtype, device="meta"))
        self._known: tuple[Tensor, float] | None = None  # of the last weight

    def forward(self, x: Tensor) -> Tensor:
        if self._known is None or self._known[0] is not self.weight:
            self._known = self.weight, self.weight.item()
        return ops.on(x.device.type).scale(x, self._known[1])


class ScaledOutputNormLayer(OutputNormLayer):
    """One that multiplies all that it puts out by a number: Gemma 4."""

    adds_up_late = False

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.mlp_scale = LayerScale(dtype)
        if config.experts is not None and config.experts.apart:
            self.mlp_norm = NoNorm()  # they have norms of their own

    def both_blocks(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        return self.mlp_block(self.attention_block(x, step))

    def mlp_block(self, x: Tensor) -> Tensor:
        return self.mlp_scale(super().mlp_block(x))


class LayerInputLayer(ScaledOutputNormLayer):
    """One behind whose MLP inputs of its own join: x + norm(out(act(gate(x)) * inputs))."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        name, hidden, channels = f"layers.{index}.", config.hidden_size, config.layer_inputs
        self.columns = range(index * channels, (index + 1) * channels)
        self.act = config.activation
        self.mlp_input_gate = make(f"{name}mlp_input_gate", hidden, channels, False)
        self.mlp_input_out = make(f"{name}mlp_input_out", channels, hidden, False)
        self.mlp_input_norm = NORMS[config.norm](config, dtype)
        self._index: Tensor | None = None

    def blocks(self) -> tuple[tuple[Block, tuple[str, ...]], ...]:
        return ((self.attention_block, ATTENTION_LINEARS), (self.second_block, self.mlp_linears))

    def both_blocks(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        return self.second_block(self.attention_block(x, step), step)

    def second_block(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        """The second half of the layer: x (N, C) to (N, C)."""
        x = add(x, self._through_mlp(self.mlp_norm(x)))
        kernels = ops.on(x.device.type)
        assert step.layer_inputs is not None  # as a decoder of such layers has it
        if self._index is None or self._index.device != x.device:
            self._index = torch.tensor(self.columns, device=x.device)
        inputs = step.select(kernels.gather(step.layer_inputs.to(x.device), self._index))
        gate = kernels.activation(self.mlp_input_gate(x), self.act)
        joined = kernels.scale_rows(gate.view(-1, 1), inputs.view(-1), 1).view(gate.shape)
        return self.mlp_scale(add(x, self.mlp_input_norm(self.mlp_input_out(joined))))


class OutputNormAloneLayer(OutputNormLayer):
    """x + norm(attention(x)), then x + norm(mlp(x)): OLMo 2 and 3."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.attention_norm, self.mlp_norm = NoNorm(), NoNorm()

    def fuse_norms(self) -> None:
        """There are none in front of linears."""


class ScaledOutputLayer(PreNormLayer):
    """A pre-norm layer of which what attention and MLP add is multiplied by a number: Granite."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.output_scale = config.output_scale

    def _attended(self, normed: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        return self._scaled(super()._attended(normed, step))

    def _through_mlp(self, normed: Tensor | Int8Rows) -> Tensor:
        return self._scaled(super()._through_mlp(normed))

    def _scaled(self, z: Tensor) -> Tensor:
        return ops.on(z.device.type).scale(z, self.output_scale)


class ParallelLayer(PreNormLayer):
    """x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own: GPT-NeoX."""

    adds_up_late = False

    def blocks(self) -> tuple[tuple[Block, tuple[str, ...]], ...]:
        return ((self.both_blocks, (*ATTENTION_LINEARS, *self.mlp_linears)),)

    def both_blocks(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        z, x = self._attended(self.attention_norm(x), step), step.select(x)
        return add(add(self._through_mlp(self.mlp_norm(x)), z), x)


class SharedNormLayer(ParallelLayer):
    """x + attention(norm(x)) + mlp(norm(x)) of one norm: Cohere, Phi."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__(config, index, dtype, make)
        self.mlp_norm = NoNorm()

    def fuse_norms(self) -> None:
        """Two linears take what the norm makes, which may not agree on how it becomes int8."""

    def both_blocks(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        normed = self.attention_norm(x)
        assert isinstance(normed, Tensor)  # as `fuse_norms` has it
        x = add(step.select(x), self._attended(normed, step))
        return add(x, self._through_mlp(step.select(normed)))


class NormedResidualLayer(PreNormLayer):
    """A pre-norm layer whose residual branches off behind the norm (a BLOOM option)."""

    adds_up_late = False

    def fuse_norms(self) -> None:
        """The residual needs what a norm makes as it is."""

    def both_blocks(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        return self.mlp_block(self.attention_block(x, step))

    def attention_block(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        x = self.attention_norm(x)
        return add(step.select(x), self.attention(x, step))

    def mlp_block(self, x: Tensor) -> Tensor:
        x = self.mlp_norm(x)
        return add(x, self.mlp(x))


class PostNormLayer(PreNormLayer):
    """norm(x + attention(x)), then norm(x + mlp(x)): OPT-350m."""

    blocks_end_in_sums = adds_up_late = False

    def fuse_norms(self) -> None:
        """The residual needs what a norm makes as it is."""

    def both_blocks(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        return self.mlp_block(self.attention_block(x, step))

    def attention_block(self, x: Tensor, step: Prefill | Decode) -> Tensor:
        return self.attention_norm(add(step.select(x), self.attention(x, step)))

    def mlp_block(self, x: Tensor) -> Tensor:
        return self.mlp_norm(add(x, self.mlp(x)))


def layer_class(config: ModelConfig) -> type[PreNormLayer]:
    """The layer that a model's norms ask for."""
    if not config.pre_norm:
        return PostNormLayer
    if config.parallel_blocks:
        return SharedNormLayer if config.shared_norm else ParallelLayer
    if config.layer_scales:
        return LayerInputLayer if config.layer_inputs else ScaledOutputNormLayer
    if config.output_norms:
        return OutputNormLayer if config.input_norms else OutputNormAloneLayer
    if config.output_scale != 1:
        return ScaledOutputLayer
    return NormedResidualLayer if config.residual_after_norm else PreNormLayer
