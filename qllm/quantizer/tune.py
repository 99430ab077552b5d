"""Tune half a quantized layer as a whole against what the float one puts out, by signed gradients.

SignRound (Cheng et al. 2023, arXiv:2309.05516): its inputs are those that the quantized layers in
front give it, its targets what the float layer makes of the float model's states, so that later
layers make up for the errors of earlier ones. Errors count by what they do to predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qllm import ops
from qllm.layers import DenseLinear, Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models.equalize import dense_linear
from qllm.models.layer import Block, PreNormLayer
from qllm.models.passes import Prefill
from qllm.quant.algorithm import TuneOptions, TuningStart
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.rounding import TunedRounding
from qllm.quantizer.workers import SharedSum, Workers

# Tokens whose activations are in memory at once.
TOKENS_PER_PASS = 2048
# On a CPU, bytes of the widest linear's activations, too: larger pieces of memory than 32 MiB go
# back to the system each time, and it clears them before they come again.
BYTES_PER_PASS = 1 << 24
# One of so many samples is held out.
HELD_OUT = 8
MAX_BITS_IN_BFLOAT16 = 4
# Values that a bias is added to together.
BIASED_AT_ONCE = 1 << 18
# So that a state of zeros has an error, too.
SMALLEST_SIZE = 1e-6
# The first step over 1 / steps, of offsets and of factors. Steps fall linearly, so that all of them
# in one direction would sum up to half of this. The more bits, the less there is to gain, and the
# less of a gradient is more than noise; what fewer steps know is less certain, too, and the way
# they may go is shorter.
RATE, RANGE_RATE, STEPS = 1.0, 0.03, 200
BITS_AT_FULL_RATE = 2


@dataclass(frozen=True)
class TuneReport:
    """What tuning did to a block of a layer: its attention, its MLP, or both where they are one.

    Attributes:
        before, tuned, after: relative root mean square error of what the block puts out, with those
            in front of it quantized and tuned: before it is tuned, when it is, and in the end.
        descended: the linears of which what coordinate descent made is better, and kept.
    """

    name: str
    before: float
    tuned: float
    after: float
    descended: Sequence[str] = ()

    @property
    def gained(self) -> bool:
        """Whether what tuning found is better, and kept."""
        return self.tuned < self.before

    def __str__(self) -> str:
        line = f"{self.name}: relative error {self.before:.2%}, {self.tuned:.2%} when tuned"
        if not self.gained:
            line += ", so that it stays as it was"
        if self.descended:
            line += f", {self.after:.2%} with {' and '.join(self.descended)} by descent"
        return line


def work_dtype(device: torch.device, bits: int) -> torch.dtype:
    """What products are computed in: bfloat16 where the hardware has it, and where its own error is
    small beside that of weights of so many bits."""
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and bits <= MAX_BITS_IN_BFLOAT16 else torch.float32


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """Add a bias (N,) to rows (M, N) in float32, in place.

    In bfloat16 it would be off by as much for every token, and be tuned against.
    """
    if y.dtype == bias.dtype:
        return y.add_(bias)
    # A whole copy would be memory that the system has to clear, which takes ten times as long.
    for rows in y.split(max(1, BIASED_AT_ONCE // len(bias))):
        rows.copy_(rows.float().add_(bias))
    return y


class _Product(torch.autograd.Function):
    """x W^T + b. What gradients say of W is summed up elsewhere, and autograd hears of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, linear: FrozenLinear) -> Tensor:
        ctx.save_for_backward(x, linear.weight)
        ctx.gradient = linear.gradient
        y = ops.multiply(x, linear.weight)
        return y if linear.bias is None else add_bias(y, linear.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.gradient is not None:
            ctx.gradient.add_product(grad_outputs[0].t(), x)
        grad_x = ops.multiply(grad_outputs[0], weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, None, None


class FrozenLinear(nn.Module):
    """A linear that gradients go through, and that has none of its own.

    Attributes:
        gradient: what the gradients of its weight are added to, where they are wanted.
    """

    gradient: SharedSum | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = weight.to(dtype), bias

    def forward(self, x: Tensor) -> Tensor:
        anchor = None if self.gradient is None else self.gradient.anchor
        return _Product.apply(x.to(self.weight.dtype), anchor, self)


class TunedLinear(FrozenLinear):
    """A linear whose weight is what its rounding gives at the moment."""

    def __init__(
        self, rounding: TunedRounding, bias: Tensor | None, dtype: torch.dtype, workers: Workers
    ) -> None:
        super().__init__(rounding.dequantize(dtype), bias, dtype)
        self.rounding = rounding
        self.gradient = SharedSum(self.weight, workers)

    def step(self, share: float) -> None:
        """Move the rounding against the gradient that came together.

        Args:
            share: of RATE and RANGE_RATE.
        """
        assert self.gradient is not None
        rate = RATE * min(1.0, BITS_AT_FULL_RATE / self.rounding.bits)
        self.rounding.step(self.gradient.take(), share * rate, share * RANGE_RATE, self.weight)


def freeze(part: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Let a linear of a part of a model be such as gradients go through."""
    module = part.get_submodule(name)
    assert isinstance(module, Linear)
    part.set_submodule(name, FrozenLinear(module.dequantize(), module.bias, dtype))


def freeze_all(part: nn.Module, dtype: torch.dtype) -> None:
    """`freeze` each of the linears."""
    for name in [name for name, module in part.named_modules() if isinstance(module, Linear)]:
        freeze(part, name, dtype)


class ReducedPrecisionLinear(nn.Module):
    """A linear between float32 activations whose products are of another type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = weight.to(dtype), bias

    def forward(self, x: Tensor) -> Tensor:
        y = ops.multiply(x.to(self.weight.dtype), self.weight).float()
        return y if self.bias is None else y.add_(self.bias)


@contextmanager
def multiplying_in(dtype: torch.dtype, layer: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let those linears of a layer that are matrices in float32 multiply in dtype inside."""
    before = {name: layer.get_submodule(name) for name in names}
    for name, module in before.items():
        if dtype != torch.float32 and isinstance(module, DenseLinear):
            layer.set_submodule(name, ReducedPrecisionLinear(module.weight, module.bias, dtype))
    try:
        yield
    finally:
        for name, module in before.items():
            layer.set_submodule(name, module)


def token_sizes(states: Tensor) -> Tensor:
    """What a norm divides each token's squared error by: (…, C) to (…).

    All that reads the states does so behind a norm, to which a token with large values counts no
    more than another: without this the few tokens that have them would be all that is tuned.
    """
    return states.square().mean(-1) + SMALLEST_SIZE


def token_errors(states: Tensor, targets: Tensor, metric: Tensor) -> Tensor:
    """Squared error of each token's state, (…, C) to (…), in shares of its size.

    Args:
        metric: M (C, C) of `fisher.read_metric`: of an error e it is e^T M e / C that counts.
    """
    error = states - targets
    return (ops.multiply(error, metric) * error).mean(-1) / token_sizes(targets)


def tuned_samples(count: int) -> int:
    """How many of the samples, the first ones, are tuned on; what tuning gained the others say.

    Roundings fit themselves to what they are tuned on: there, tuning nearly always seems to gain.
    """
    return count - -(-count // HELD_OUT) if count > 1 else count


def held_out(count: int) -> slice:
    """The samples that judge."""
    return slice(tuned_samples(count) % count, count)


def relative_error(states: HiddenStates, targets: HiddenStates, metric: Tensor) -> float:
    """Root mean square over the tokens of how far states are from their targets."""
    errors = [
        token_errors(ours.float(), theirs.float(), metric).double().mean()
        for ours, theirs in zip(states.states, targets.states, strict=True)
    ]
    return torch.stack(errors).mean().sqrt().item()


def advance_watched(
    states: HiddenStates,
    layer: PreNormLayer,
    block: tuple[Block, Sequence[str]],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Put states through a block; how far what its linears put out is from what float ones would
    of the same inputs.

    Args:
        layer: whose linears are matrices in float32.
        block: one of its own.
        weights: the float weights by name in the layer, of linears of the block.
        dtype: what products are computed in.

    Returns:
        relative root mean square errors by name.
    """
    run, names = block
    squares = {name: torch.zeros(2, dtype=torch.float64) for name in weights}

    def watch(name: str, error: Tensor) -> RemovableHandle:
        matrices = error.to(dtype), weights[name].to(dtype)

        def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].to(dtype)
            for index, matrix in enumerate(matrices):
                y = ops.multiply(x, matrix).float()
                squares[name][index] += torch.linalg.vector_norm(y).double().cpu() ** 2

        return layer.get_submodule(name).register_forward_pre_hook(see)

    errors = {name: dense_linear(layer, name).weight - weights[name] for name in weights}
    with multiplying_in(dtype, layer, names):
        hooks = [watch(*entry) for entry in errors.items()]
        try:
            states.advance(run)
        finally:
            for hook in hooks:
                hook.remove()
    return {
        name: (error / whole).sqrt().item() if whole else 0.0
        for name, (error, whole) in squares.items()
    }


def tune_block(
    layer: PreNormLayer,
    block: tuple[Block, Sequence[str]],
    linears: Mapping[str, tuple[TuningStart, WeightOnlyLinear]],
    states: tuple[HiddenStates, HiddenStates],
    metric: Tensor,
    dtype: torch.dtype,
    options: TuneOptions,
    add: Callable[[float], object],
) -> dict[str, WeightOnlyLinear]:
    """Tune the linears of a block that were quantized, together.

    Args:
        layer: float32.
        block: one of its own, all of whose linears are replaced.
        linears: what the linears to tune start from, and layers of their kind, by name in the
            layer.
        states: those in front of the block, and those wanted behind it.
        metric: as of `token_errors`.
        dtype: what products are computed in.
        add: called with shares of the work as they are done, which sum up to 1.

    Returns:
        the tuned linears.
    """
    inputs, targets = states
    samples, device = tuned_samples(len(inputs.states)), inputs.states.device
    workers = Workers(device)
    tuned = {}
    widths: list[int] = []
    run, names = block
    for name in names:
        if name in linears:
            start, found = linears[name]
            rounding = TunedRounding(*start, found.spec.bits, found.spec.group_size)
            tuned[name] = TunedLinear(rounding, found.bias, dtype, workers)
            layer.set_submodule(name, tuned[name])
        else:
            freeze(layer, name, dtype)
        replaced = layer.get_submodule(name)
        assert isinstance(replaced, FrozenLinear)
        widths += replaced.weight.shape
    metric = metric.to(dtype)
    tokens = tokens_per_pass(max(widths), dtype, device)
    draw = torch.Generator().manual_seed(options.seed)
    batch = options.samples(*inputs.states.shape[1:])
    certain = min(1.0, (options.steps / STEPS) ** 0.5)
    at_once = workers.parts(min(batch, samples), tokens // inputs.states.shape[1])

    def add_gradients(chosen: Tensor) -> None:
        _add_gradients(run, inputs, targets, metric, chosen)

    with workers:
        for step in range(options.steps):
            chosen = torch.randperm(samples, generator=draw)[:batch].to(device)
            workers.map(add_gradients, chosen.split(at_once))
            left = 1 - step / options.steps
            for linear in tuned.values():
                linear.step(left * certain / options.steps)
            add(1 / options.steps)
    return {
        name: WeightOnlyLinear.from_packed(
            linear.rounding.packed(), found.bias, found.spec, found.in_features
        )
        for name, linear in tuned.items()
        for found in [linears[name][1]]
    }


def tokens_per_pass(widest: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens' gradients are computed together, or those of one sample, if it has more.

    Args:
        widest: channels of the activations that are.
    """
    if device.type == "cuda":
        return TOKENS_PER_PASS
    return min(TOKENS_PER_PASS, BYTES_PER_PASS // (widest * dtype.itemsize))


def _add_gradients(
    run: Block, inputs: HiddenStates, targets: HiddenStates, metric: Tensor, chosen: Tensor
) -> None:
    """Gradients of half the errors of some samples (B,), of which each counts alike."""
    length = inputs.states.shape[1]
    with torch.enable_grad(), ops.differentiable():
        x, wanted = (
            each.states.index_select(0, chosen).flatten(0, 1).float() for each in (inputs, targets)
        )
        step = Prefill([length] * len(chosen), None, inputs.positions, x)
        y = run(x, step)
        scaled = (y.detach() - wanted) / token_sizes(wanted)[:, None]
        error = ops.multiply(scaled.to(metric.dtype), metric)  # which is symmetric
        y.backward(error.float() / wanted[:length].numel())
