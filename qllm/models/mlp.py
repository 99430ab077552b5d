"""What stands behind a layer's attention: an MLP, or a mixture of experts, which are MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qllm import ops
from qllm.config import ModelConfig
from qllm.models.attention import MakeLinear
from qllm.models.norms import NORMS, add
from qllm.ops import phase
from qllm.ops.cpu.capture import host_callback
from qllm.ops.cpu.experts import ExpertCalls
from qllm.ops.reference import SWIGLU_OAI

if TYPE_CHECKING:
    from qllm.parallel.layers import LinearOrShard

EXPERTS, SHARED = "mlp.experts.", "mlp.shared."
# What decides on experts, and how much each counts, is no bitwidth's matter.
ROUTERS = ("mlp.router", "mlp.shared_gate")


class MLP(nn.Module):
    """down(act(up(x)))."""

    up: LinearOrShard
    down: LinearOrShard

    def __init__(self, config: ModelConfig, name: str, inner: int, make: MakeLinear) -> None:
        """
        Args:
            name: its own, in front of those of its linears.
            inner: channels between them.
        """
        super().__init__()
        self.act = SWIGLU_OAI if config.clamped_swiglu else config.activation
        hidden, bias = config.hidden_size, config.mlp_bias
        self.up = make(f"{name}.up", hidden, self.up_rows(inner), bias)
        self.down = make(f"{name}.down", inner, hidden, bias)

    @staticmethod
    def up_rows(inner: int) -> int:
        return inner

    def mlps(self) -> Iterator[MLP]:
        """Those of which it consists."""
        yield self

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(ops.on(x.device.type).activation(x, self.act))


class GatedMLP(MLP):
    """down(act(gate(x)) * up(x)), gate and up fused into one matrix, rows [gate; up]."""

    @staticmethod
    def up_rows(inner: int) -> int:
        return 2 * inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(ops.on(x.device.type).gated_activation(x, self.act))


class MixtureOfExperts(nn.Module):
    """A weighted sum of what a few of many MLPs give, which a router chooses for each token.

    A token's weights are the largest of the softmax of its router logits (Shazeer et al. 2017;
    Fedus et al. 2021). An expert takes all tokens that chose it at once; what the experts of a
    token give is added up in float32 in the order of the experts, so that no token's result
    depends on what others choose.

    A step on a CPU is one call, which chooses what it calls; else Python does, and a step that is
    captured calls back for it.
    """

    shared: MLP | None
    shared_gate: LinearOrShard | None

    def __init__(self, config: ModelConfig, name: str, make: MakeLinear) -> None:
        super().__init__()
        experts, kind = config.experts, mlp_class(config)
        assert experts is not None  # as `make_mlp` has it
        self.top_k, self.normalizes = experts.top_k, experts.normalizes
        self.router: LinearOrShard = make(
            f"{name}.router", config.hidden_size, experts.count, experts.router_bias
        )
        self.experts = nn.ModuleList(
            kind(config, f"{name}.experts.{i}", experts.intermediate_size, make)
            for i in range(experts.count)
        )
        self.shared = self.shared_gate = None
        self._calls: dict[torch.dtype, ExpertCalls | None] = {}
        if experts.shared_size:
            self.shared = kind(config, f"{name}.shared", experts.shared_size, make)
        if experts.shared_size and not experts.apart:
            self.shared_gate = make(f"{name}.shared_gate", config.hidden_size, 1, False)

    def mlps(self) -> Iterator[MLP]:
        """Those of which it consists."""
        for mlp in (*self.experts, *([] if self.shared is None else [self.shared])):
            assert isinstance(mlp, MLP)
            yield mlp

    def routed(self) -> Iterator[MLP]:
        """Those that `route` numbers."""
        return self.mlps()

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.shared_gate is None else self.shared_gate(x)
        route = ops.on(x.device.type).route
        weights, chosen = route(self.router(x), gate, self.top_k, normalizes=self.normalizes)
        return self.mixed(x, weights, chosen)

    def mixed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """What the experts that each row of x (N, C) takes give, times their weights.

        Args:
            weights, chosen: of `route`.
        """
        device = x.device.type
        calls = self._calls_of_step(x) if phase.decoding() and device == "cpu" else None
        if calls is not None:
            return calls(x, weights, chosen)
        y = torch.empty_like(x)
        mix = self._mix_in_step if phase.decoding() else self._mix
        host_callback(partial(mix, x, weights, chosen, y))
        return y

    def _mix_in_step(self, x: Tensor, weights: Tensor, chosen: Tensor, y: Tensor) -> None:
        """`_mix`, of which a captured step does not say that it is one."""
        with phase.decode():
            self._mix(x, weights, chosen, y)

    def _mix(self, x: Tensor, weights: Tensor, chosen: Tensor, y: Tensor) -> None:
        """Write to y (N, C) what the experts that each row of x (N, C) takes give.

        Args:
            weights, chosen: of `route`.
        """
        total = torch.zeros(x.shape, device=x.device)
        experts, order = chosen.flatten().sort(stable=True)
        mlps, each = list(self.routed()), chosen.shape[1]
        counts = experts.bincount(minlength=len(mlps)).tolist()
        weights = weights.flatten()[order, None]
        rows, start = order // each, 0
        for expert, count in zip(mlps, counts, strict=True):
            if not count:
                continue
            taken = slice(start, start + count)
            start += count
            z = expert(x[rows[taken]])
            total.index_add_(0, rows[taken], z.float() * weights[taken])
        y.copy_(total)

    def _calls_of_step(self, x: Tensor) -> ExpertCalls | None:
        """What a step calls, of rows such as x has; None where it is `_mix`."""
        if x.dtype not in self._calls:
            self._calls[x.dtype] = ExpertCalls.of(self.routed(), x)
        return self._calls[x.dtype]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: calls are of this process."""
        return {**self.__dict__, "_calls": {}}


class ExpertScales(nn.Module):
    """A factor of each expert's weights: weight (E,)."""

    weight: Tensor

    def __init__(self, experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(experts, dtype=dtype, device="meta"))
        self._known: tuple[Tensor, Tensor] | None = None  # the last weight in float32

    def forward(self, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weights (N, top_k) of experts, times their factors."""
        if self._known is None or self._known[0] is not self.weight:
            self._known = self.weight, self.weight.float()[:, None]
        kernels = ops.on(weights.device.type)
        factors = kernels.embedding(chosen.view(-1), self._known[1], 0)
        return kernels.scale_rows(weights.view(-1, 1), factors.view(-1), 1).view(weights.shape)


class ExpertsBesideMLP(MixtureOfExperts):
    """An MLP of all tokens and experts, each between norms of their own: Gemma 4.

    They take what no norm is in front of, as their router does.
    """

    def __init__(
        self, config: ModelConfig, name: str, make: MakeLinear, dtype: torch.dtype
    ) -> None:
        super().__init__(config, name, make)
        assert config.experts is not None
        norm = NORMS[config.norm]
        self.router_norm, self.router_scale = norm(config, dtype), config.hidden_size**-0.5
        self.expert_scales = ExpertScales(config.experts.count, dtype)
        self.experts_norm, self.experts_output_norm = norm(config, dtype), norm(config, dtype)
        self.shared_norm, self.shared_output_norm = norm(config, dtype), norm(config, dtype)

    def routed(self) -> Iterator[MLP]:
        for mlp in self.experts:
            assert isinstance(mlp, MLP)
            yield mlp

    def forward(self, x: Tensor) -> Tensor:
        kernels = ops.on(x.device.type)
        logits = self.router(kernels.scale(self.router_norm(x), self.router_scale))
        weights, chosen = kernels.route(logits, None, self.top_k, normalizes=self.normalizes)
        weights = self.expert_scales(weights, chosen)
        z = self.experts_output_norm(self.mixed(self.experts_norm(x), weights, chosen))
        assert self.shared is not None  # as a family of such layers has it
        return add(self.shared_output_norm(self.shared(self.shared_norm(x))), z)


def mlp_class(config: ModelConfig) -> type[MLP]:
    """What an MLP, or each expert, of a model is."""
    return GatedMLP if config.gated_mlp else MLP


def has_experts(config: ModelConfig, index: int) -> bool:
    """Whether a layer has a mixture of experts in the place of an MLP."""
    return config.experts is not None and config.experts.layers[index]


def is_of_expert(name: str) -> bool:
    """Whether a linear ("layers.1.mlp.experts.3.up", or without its layer) is an expert's."""
    return EXPERTS in name or SHARED in name


def inner_channels(config: ModelConfig) -> int:
    """What a token has of inner channels behind attention, in the layers where it is most."""
    experts = config.experts
    if experts is None:
        return config.intermediate_size
    of_experts = experts.top_k * experts.intermediate_size + experts.shared_size
    return max(config.intermediate_size, of_experts)


def make_mlp(
    config: ModelConfig, index: int, dtype: torch.dtype, make: MakeLinear
) -> MLP | MixtureOfExperts:
    """What a layer has behind its attention."""
    name = f"layers.{index}.mlp"
    if has_experts(config, index):
        if config.experts is not None and config.experts.apart:
            return ExpertsBesideMLP(config, name, make, dtype)
        return MixtureOfExperts(config, name, make)
    return mlp_class(config)(config, name, config.intermediate_size, make)


def mlp_linears(config: ModelConfig, index: int) -> tuple[str, ...]:
    """Names in a layer of the linears behind its attention that may be quantized.

    The experts' come in two runs: those of a run take inputs that no other of it changes.
    """
    if not has_experts(config, index):
        return ("mlp.up", "mlp.down")
    assert config.experts is not None
    names = [f"{EXPERTS}{i}" for i in range(config.experts.count)]
    names += [SHARED.removesuffix(".")] if config.experts.shared_size else []
    return tuple(f"{name}.{linear}" for linear in ("up", "down") for name in names)
