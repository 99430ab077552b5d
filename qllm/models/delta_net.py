"""The gated delta rule in the place of a layer's attention (Yang et al. 2024; Qwen3-Next)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import DeltaNetConfig, ModelConfig
from qllm.models.attention import Attention, MakeLinear, attention_class
from qllm.models.cache import state_shape
from qllm.models.mlp import ROUTERS
from qllm.models.norms import HeadNorm
from qllm.models.passes import Decode, Prefill
from qllm.ops.reference import Int8Rows

if TYPE_CHECKING:
    from qllm.parallel.layers import LinearOrShard


# Linears of layers that are no bitwidth's matter: what chooses, and what says how fast to forget.
ALWAYS_FLOAT = (*ROUTERS, "attention.gates")


class CausalConv(nn.Module):
    """Weights of a convolution of each channel: (C, 1, K), as `torch.nn.Conv1d` has them.

    Attributes:
        ranges: runs of channels that this process has; None: all.
    """

    weight: Tensor
    ranges: Sequence[range] | None = None

    def __init__(self, delta: DeltaNetConfig, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(delta.channels, 1, delta.kernel, dtype=dtype, device="meta")
        self.register_buffer("weight", weight)
        # As ops take them, which a step that is captured keeps: those of the last weight.
        self._known: tuple[Tensor, Tensor] | None = None

    @property
    def by_token(self) -> Tensor:
        """(K, C)."""
        if self._known is None or self._known[0] is not self.weight:
            self._known = self.weight, self.weight[:, 0].t().contiguous()
        return self._known[1]


class HeadValues(nn.Module):
    """A number of each head: weight (H,).

    Attributes:
        ranges: runs of heads that this process has; None: all.
    """

    weight: Tensor
    ranges: Sequence[range] | None = None

    def __init__(self, delta: DeltaNetConfig, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(delta.value_heads, dtype=dtype, device="meta")
        self.register_buffer("weight", weight)


class GatedDeltaNet(nn.Module):
    """Linear attention whose memory fades and is corrected, with a convolution in front of it.

    It has attention's two matrices: QKV with rows [q heads; k heads; v heads; gates of the output],
    and the one behind. What says how fast memory fades and how much a token changes has a matrix
    of a few rows, `gates`, which is no bitwidth's matter.
    """

    qkv: LinearOrShard
    gates: LinearOrShard
    out: LinearOrShard

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
    ) -> None:
        super().__init__()
        delta, name = config.delta_net, f"layers.{index}.attention"
        assert delta is not None  # as `make_mixer` has it
        width = delta.value_heads * delta.value_dim
        self.index = index
        self.is_of(delta)
        self.qkv = make(f"{name}.qkv", config.hidden_size, delta.channels + width, False)
        self.gates = make(f"{name}.gates", config.hidden_size, 2 * delta.value_heads, False)
        self.conv = CausalConv(delta, dtype)
        # How fast memory fades: the logarithm of A, and a bias of the gates (Gu and Dao 2023).
        self.log_decay, self.decay_bias = HeadValues(delta, dtype), HeadValues(delta, dtype)
        self._decay: tuple[Tensor, Tensor] | None = None  # as ops take it
        self.norm = HeadNorm(delta.value_dim, config.norm_eps, dtype)
        self.out = make(f"{name}.out", width, config.hidden_size, False)

    def is_of(self, delta: DeltaNetConfig) -> None:
        """Take these numbers of heads."""
        self.shape, self.gated_from = state_shape(delta), delta.channels

    @property
    def decay(self) -> Tensor:
        """float32 (2, H): what says how fast each head's memory fades."""
        parts = self.log_decay.weight, self.decay_bias.weight
        if self._decay is None or self._decay[0] is not parts[0]:
            self._decay = parts[0], torch.stack(parts).float()
        return self._decay[1]

    def forward(self, x: Tensor | Int8Rows, step: Prefill | Decode) -> Tensor:
        assert isinstance(x, Tensor)
        device = ops.on(x.device.type)
        qkv, gates = self.qkv(x), self.gates(x)
        state = step.state(self.index, self.shape, qkv)
        convolved = device.causal_conv(qkv, self.conv.by_token, state, step.batch)
        z = device.delta_rule(convolved, gates, self.decay, state, step.batch)
        z, qkv = step.select(z), step.select(qkv)
        return self.out(device.gate(self.norm(z), qkv, self.gated_from, "silu"))


def has_delta_net(config: ModelConfig, index: int) -> bool:
    """Whether a layer has a delta net in the place of attention."""
    return config.delta_net is not None and config.delta_net.layers[index]


def make_mixer(
    config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
) -> Attention | GatedDeltaNet:
    """What mixes the tokens of a layer."""
    if has_delta_net(config, index):
        return GatedDeltaNet(config, index, dtype, make)
    return attention_class(config)(config, index, dtype, make)
