"""Tune all scales of a quantized model against the distributions that the float model predicts.

The last step of EfficientQAT (Chen et al. 2024, arXiv:2407.11062), with the Kullback-Leibler
divergence from the float model in place of a text's own next tokens: integers and zeros stay, each
scale is multiplied by a factor, found by gradient descent (Adam).

Where a batch's activations in all layers are many, one layer's are there at a time, and its
weights: a step keeps what is in front of each layer, and computes each once more on its way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from qllm import ops
from qllm.config import ModelConfig
from qllm.layers import Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder
from qllm.models.embeddings import QuantizedEmbedding
from qllm.models.logits import finish_logits
from qllm.models.mlp import inner_channels
from qllm.models.norms import Norm
from qllm.models.passes import Prefill
from qllm.quant.algorithm import DistillOptions
from qllm.quant.packing import group_width
from qllm.quant.rtn import SMALLEST_HALF_SCALE, grouped, row_pieces
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.tune import (
    FrozenLinear,
    add_bias,
    freeze,
    freeze_all,
    held_out,
    tuned_samples,
    work_dtype,
)
from qllm.quantizer.workers import SharedSum, Workers, workers_on

# Logits that are in memory at once, in each of a few copies.
LOGITS_AT_ONCE = 1 << 24
# Weights that are dequantized together, or that gradients are computed of: what is made of them on
# the way stays in the caches, and is memory that is there already.
WEIGHTS_AT_ONCE = 1 << 21
# Activations of all layers that are in memory together, in bytes; where there are more, layers are
# computed once more.
ACTIVATIONS_AT_ONCE = 1 << 30
# Of Adam's averages of gradients and of their squares, what each step leaves.
BETA1, BETA2 = 0.9, 0.95
# So that a factor without a gradient stays.
EPS = 1e-8
# What rounding does to a weight halves with each bit, and so does what its scale has to gain, and
# how far it may go: noise carries a factor as far as gradients do.
BITS_AT_FULL_RATE = 2


class _ScaledProduct(torch.autograd.Function):
    """x W^T + b, of a weight that is dequantized here, and that gradients of its factors go to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, linear: ScaledLinear) -> Tensor:
        weight = linear.matrix()
        ctx.save_for_backward(x, weight)
        ctx.linear = linear
        y = ops.multiply(x, weight)
        return y if linear.bias is None else add_bias(y, linear.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        ctx.linear.gradient.add(ctx.linear.grad_factors(x, grad_outputs[0], weight))
        grad_x = ops.multiply(grad_outputs[0], weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, None, None


class ScaledLinear(nn.Module):
    """A quantized linear whose scales have factors.

    Attributes:
        factors: float32 (N, G), each a power of e.
        gradient: what gradients of the factors are added to.
    """

    def __init__(self, linear: WeightOnlyLinear, dtype: torch.dtype, workers: Workers) -> None:
        super().__init__()
        self.packed, self.spec, self.in_features = linear.packed, linear.spec, linear.in_features
        self.bias, self.dtype = linear.bias, dtype
        self.group = group_width(linear.in_features, linear.spec.group_size)
        self.factors = torch.zeros_like(self.packed.scales, dtype=torch.float32)
        self.gradient = SharedSum(self.factors, workers)
        self._cached_matrix: Tensor | None = None
        # Averages of the factors' gradients, and of their squares.
        self._exp_avg = torch.zeros_like(self.factors)
        self._exp_avg_sq = torch.zeros_like(self.factors)

    def scales(self) -> Tensor:
        """The scales as they are stored: (N, G)."""
        scales = self.packed.scales.float() * self.factors.exp()
        if self.packed.scales.dtype == torch.float16:
            scales = scales.clamp_(min=SMALLEST_HALF_SCALE)
        return scales.to(self.packed.scales.dtype)

    def cache_matrix(self) -> None:
        """Have the weight stay in memory until the next step."""
        self._cached_matrix = None
        self._cached_matrix = self.matrix()

    def matrix(self) -> Tensor:
        """The weight (N, K) with its scales as they are."""
        if self._cached_matrix is not None:
            return self._cached_matrix
        packed = self.packed._replace(scales=self.scales())
        scaled = WeightOnlyLinear.from_packed(packed, None, self.spec, self.in_features)
        shape, device = (len(packed.scales), self.in_features), packed.scales.device
        found = torch.empty(shape, dtype=self.dtype, device=device)
        for rows in row_pieces(found, WEIGHTS_AT_ONCE):
            found[rows] = scaled.dequantize(rows)
        return found

    def grad_factors(self, x: Tensor, grad_y: Tensor, weight: Tensor) -> Tensor:
        """The gradient by the factors (N, G), given x (M, K) and the gradient by y (M, N)."""
        found = torch.empty_like(self.factors)
        for rows in row_pieces(weight, WEIGHTS_AT_ONCE):
            # A weight is its scale times a constant: its gradient by the factor is its own times
            # what it is.
            grad_factors = ops.multiply(grad_y[:, rows].t(), x.t()).float().mul_(weight[rows])
            if self.packed.perm is not None:
                grad_factors = grad_factors[:, self.packed.perm]
            torch.sum(grouped(grad_factors, self.group), -1, out=found[rows])
        return found

    def forward(self, x: Tensor) -> Tensor:
        return _ScaledProduct.apply(x.to(self.dtype), self.gradient.anchor, self)

    def step(self, number: int, rate: float) -> None:
        """Move the factors against the gradient that came together, as Adam does.

        `torch.optim` computes the same, but imports all of `torch.compile` first, for seconds.

        Args:
            number: of the step, from 1.
        """
        gradient = self.gradient.take().sum(0)
        self._exp_avg.lerp_(gradient, 1 - BETA1)
        self._exp_avg_sq.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        root = self._exp_avg_sq.sqrt() / (1 - BETA2**number) ** 0.5
        rate /= 1 - BETA1**number
        self.factors.addcdiv_(self._exp_avg, root.add_(EPS), value=-rate)
        self._cached_matrix = None


class _Student:
    """A quantized model, its linears replaced by such as gradients go through.

    Attributes:
        again: layers are computed once more on the way back, since their activations are many.
        workers: among which samples are divided.
    """

    def __init__(
        self, model: Decoder, float_head: Tensor | None, dtype: torch.dtype, *, again: bool
    ) -> None:
        self.model, self.again = model, again
        self.workers = Workers(model.device)
        bias = getattr(model.lm_head, "bias", None)  # which is the float head's as well
        self.scaled: dict[str, ScaledLinear] = {}
        # A packed embedding stays as it is, and a head that is tied to it.
        table = model.embed.linear if isinstance(model.embed, QuantizedEmbedding) else None
        for name, module in list(model.named_modules()):
            if isinstance(module, Norm):
                module.round_no_more()
                for key, buffer in list(module.named_buffers()):
                    setattr(module, key, buffer.float())
            elif isinstance(module, WeightOnlyLinear) and module is not table:
                self.scaled[name] = ScaledLinear(module, dtype, self.workers)
                model.set_submodule(name, self.scaled[name])
        freeze_all(model.layers, dtype)
        for name, module in list(model.named_children()):
            if isinstance(module, Linear):
                freeze(model, name, dtype)
        self.float_head: nn.Module = model.lm_head
        if float_head is not None:
            self.float_head = FrozenLinear(float_head, bias, dtype)

    def head(self, x: Tensor, matrix: nn.Module) -> Tensor:
        """Logits (M, V) of states (M, C) behind the last layer, by one of the two heads."""
        model = self.model
        logits = matrix(model.project_out(model.final_norm(x)))
        return finish_logits(model.config, logits, torch.float32)

    def states(self, samples: Sequence[Sequence[int]]) -> Tensor:
        """What is behind the last layer: (B T, C)."""
        model, length = self.model, len(samples[0])
        with torch.no_grad():
            x = HiddenStates.embed(model, samples, torch.float32).states.flatten(0, 1)
        step = Prefill([length] * len(samples), None, model.positions, x)
        for layer in model.layers:
            if self.again:
                x = checkpoint(
                    layer,
                    x,
                    step,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=_contexts,
                )
            else:
                x = layer(x, step)
        return x


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """What a layer is computed in, and computed once more in.

    The second is on the thread that goes back, on GPUs one of autograd's own, which is in no mode.
    """
    return nullcontext(), ops.differentiable()


def _activations(config: ModelConfig, tokens: int, length: int, layers: int | None = None) -> int:
    """About what tokens of samples of a length have in some layers, or all, in bytes."""
    # Of the scores, which plain torch keeps in 16 bits and kernels do not, a half are seen.
    width = 8 * (config.hidden_size + inner_channels(config)) + config.num_heads * length // 3
    return 4 * tokens * width * (layers or config.num_layers)


def memory_needed(
    model: Decoder, samples: int, length: int, options: DistillOptions, device: torch.device
) -> int:
    """About what it takes at its peak, in bytes.

    Args:
        model: the quantized one, on the meta device.
        samples, length: of the calibration text.
        device: where it is tuned.
    """
    config = model.config
    held = sum(tensor.nbytes for tensor in model.buffers())
    head = 2 * config.vocab_size * config.embed_size  # in bfloat16, once more
    layer = sum(
        module.in_features * module.out_features
        for module in model.layers[0].modules()
        if isinstance(module, Linear)
    )
    tokens = min(options.samples(length, config.hidden_size), samples) * length
    passes, workers = _activations(config, tokens, length), workers_on(device)
    if passes > ACTIVATIONS_AT_ONCE:
        passes = _activations(config, tokens, length, 1)
        passes += 4 * tokens * config.hidden_size * config.num_layers
        layer *= workers  # of which each dequantizes it
    else:
        layer *= config.num_layers  # whose weights are there as long as their activations
    # Up to float32; and what is computed from a few weights, in about as many copies.
    layer = 4 * (layer + 4 * workers * WEIGHTS_AT_ONCE)
    return held + head + layer + passes + 4 * 4 * LOGITS_AT_ONCE


def tune_scales(
    model: Decoder,
    samples: Sequence[Sequence[int]],
    targets: Tensor,
    float_head: Tensor | None,
    options: DistillOptions,
    add: Callable[[float], object],
) -> tuple[dict[str, Tensor], float, float]:
    """Tune all scales of a quantized model.

    Args:
        model: all of whose linears are replaced.
        samples: the calibration text.
        targets: what the float model makes of them, behind the last layer: (S, T, C).
        float_head: the matrix of the float model's head, where the model's is quantized.
        add: called with shares of the work as they are done, which sum up to 1.

    Returns:
        the scales (N, G) by the linears' names, {} where none are better than those there are; and
        the mean divergence over the samples that are held out, before and after, in nats.
    """
    count = len(samples)
    learning, judging = tuned_samples(count), torch.arange(count)[held_out(count)]
    bits = max(m.spec.bits for m in model.modules() if isinstance(m, WeightOnlyLinear))
    batch = min(options.samples(*targets.shape[1:]), learning)
    length = targets.shape[1]
    again = _activations(model.config, batch * length, length) > ACTIVATIONS_AT_ONCE
    student = _Student(model, float_head, work_dtype(model.device, bits), again=again)
    workers, linears = student.workers, list(student.scaled.values())
    draw = torch.Generator().manual_seed(options.seed)
    # A pass over what is held out in front, one behind; a step costs three times its samples'.
    work = 2 * len(judging) + 3 * options.steps * batch

    def pass_through(chosen: Tensor, *, learn: bool) -> float:
        def one(part: Tensor) -> float:
            wanted = targets[part].flatten(0, 1).to(model.device)
            with torch.set_grad_enabled(learn), ops.differentiable():
                states = student.states([samples[i] for i in part.tolist()])
                return _divergence(student, states, wanted, len(chosen) * length)

        if not again:
            workers.map(ScaledLinear.cache_matrix, linears)
        return sum(workers.map(one, chosen.split(workers.parts(len(chosen), batch))))

    def mean() -> float:
        total = 0.0
        for chosen in judging.split(batch):
            total += pass_through(chosen, learn=False) * len(chosen)
            add(len(chosen) / work)
        return total / len(judging)

    with workers:
        before, order = mean(), torch.empty(0, dtype=torch.int64)
        for step in range(options.steps):
            if len(order) < batch:
                order = torch.randperm(learning, generator=draw)
            chosen, order = order[:batch], order[batch:]
            pass_through(chosen, learn=True)
            left = 1 - step / options.steps
            for linear in linears:
                rate = options.rate * _share_of_rate(linear.spec.bits)
                linear.step(step + 1, rate * left)
            add(3 * batch / work)
        after = mean()
    if not after < before:
        return {}, before, after
    return {name: linear.scales() for name, linear in student.scaled.items()}, before, after


def _share_of_rate(bits: int) -> float:
    """Of the rate, what factors of weights of so many bits take."""
    return 0.5 ** max(0, bits - BITS_AT_FULL_RATE)


def _divergence(student: _Student, states: Tensor, targets: Tensor, tokens: int) -> float:
    """The divergence of states (M, C) from those wanted, over so many tokens; where they have
    gradients, these are passed on, and nobody asks for its value, which is 0 here."""
    rows = max(1, LOGITS_AT_ONCE // student.workers.count // student.model.config.vocab_size)
    learn, total, back = states.requires_grad, 0.0, torch.empty_like(states)
    for start in range(0, len(states), rows):
        part = slice(start, start + rows)
        with torch.no_grad():
            theirs = student.head(targets[part].float(), student.float_head)
        end = states[part].detach().requires_grad_(learn)
        ours = student.head(end, student.model.lm_head)
        if not learn:
            logs = ours.log_softmax(-1), theirs.log_softmax(-1)
            total += kl_div(*logs, reduction="sum", log_target=True).item() / tokens
            continue
        ours.backward((ours.detach().softmax(-1) - theirs.softmax(-1)) / tokens)
        assert end.grad is not None
        back[part] = end.grad
    if learn:
        states.backward(back)
    return total
