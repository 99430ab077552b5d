"""Tune all scales of a quantized model against the distributions that the float model predicts.

The last step of EfficientQAT (Chen et al. 2024, arXiv:2407.11062), with the Kullback-Leibler
divergence from the float model in place of a text's own next tokens: integers and zeros stay, each
scale is multiplied by a factor, found by gradient descent (Adam).

One layer's weights are dequantized at a time: a step goes forward without gradients, keeps the
states in front of each layer, and goes back layer by layer, each computed once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from qllm import ops
from qllm.layers import Linear
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder
from qllm.models.cache import Prefill
from qllm.models.layer import Norm
from qllm.quant.algorithm import DistillOptions
from qllm.quant.packing import group_width
from qllm.quant.rtn import SMALLEST_HALF_SCALE, grouped
from qllm.quantizer.hidden import HiddenStates
from qllm.quantizer.tune import FrozenLinear, held_out, tuned_samples, work_dtype

# Logits that are in memory at once, in each of a few copies.
LOGITS_AT_ONCE = 1 << 24


class ScaledLinear(FrozenLinear):
    """A quantized linear whose scales have factors.

    Attributes:
        factors: float32 (N, G), each a power of e.
    """

    def __init__(self, linear: WeightOnlyLinear, dtype: torch.dtype) -> None:
        self.packed, self.spec, self.in_features = linear.packed, linear.spec, linear.in_features
        super().__init__(self.packed.scales.new_empty(0), linear.bias, dtype)
        self.dtype = dtype
        self.group = group_width(linear.in_features, linear.spec.group_size)
        self.factors = nn.Parameter(torch.zeros_like(self.packed.scales, dtype=torch.float32))

    def scales(self) -> Tensor:
        """The scales as they are stored: (N, G)."""
        scales = self.packed.scales.float() * self.factors.detach().exp()
        if self.packed.scales.dtype == torch.float16:
            scales = scales.clamp_(min=SMALLEST_HALF_SCALE)
        return scales.to(self.packed.scales.dtype)

    def begin(self) -> None:
        """Dequantize, for passes with gradients or without."""
        packed = self.packed._replace(scales=self.scales())
        scaled = WeightOnlyLinear.from_packed(packed, None, self.spec, self.in_features)
        self.weight = scaled.dequantize().to(self.dtype).requires_grad_()

    def end(self) -> None:
        """Let the weight go; its gradient becomes one of the factors."""
        if self.weight.grad is not None:
            # A weight is its scale times a constant: its gradient by the factor is its own times
            # what it is.
            by_factor = self.weight.grad.float() * self.weight.detach().float()
            if self.packed.perm is not None:
                by_factor = by_factor[:, self.packed.perm]
            by_factor = grouped(by_factor, self.group).sum(-1)
            seen = self.factors.grad
            self.factors.grad = by_factor if seen is None else seen + by_factor
        self.weight = self.weight.detach().new_empty(0)


class _Student:
    """A quantized model, its linears replaced by such as gradients go through."""

    def __init__(self, model: Decoder, float_head: Tensor | None, dtype: torch.dtype) -> None:
        self.model = model
        self.scaled: dict[str, ScaledLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, Norm):
                for key, buffer in list(module.named_buffers()):
                    setattr(module, key, buffer.float())
            elif isinstance(module, WeightOnlyLinear):
                self.scaled[name] = ScaledLinear(module, dtype)
                model.set_submodule(name, self.scaled[name])
            elif isinstance(module, Linear):
                model.set_submodule(name, FrozenLinear(module.dequantize(), module.bias, dtype))
        self.float_head: nn.Module = model.lm_head
        if float_head is not None:
            self.float_head = FrozenLinear(float_head, None, dtype)

    def head(self, x: Tensor, matrix: nn.Module) -> Tensor:
        """Logits (M, V) of states (M, C) behind the last layer, by one of the two heads."""
        model = self.model
        return model.capped(matrix(model.project_out(model.final_norm(x))).float())

    def layer(self, index: int, x: Tensor, step: Prefill, back: Tensor | None = None) -> Tensor:
        """What a layer makes of x (M, C); or, of gradients behind it, those in front of it."""
        layer = self.model.layers[index]
        scaled = [module for module in layer.modules() if isinstance(module, ScaledLinear)]
        for linear in scaled:
            linear.begin()
        if back is None:
            with torch.no_grad():
                y = layer(x, step)
        else:
            x = x.requires_grad_()
            layer(x, step).backward(back)
            y = x.grad
        for linear in scaled:
            linear.end()
        return y


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler divergences of logits (M, V), summed up."""
    return kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)


def memory_needed(model: Decoder, samples: int, length: int, options: DistillOptions) -> int:
    """About what it takes at its peak, in bytes.

    Args:
        model: the quantized one, on the meta device.
        samples, length: of the calibration text.
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
    passes = (
        4 * tokens * (config.hidden_size * (config.num_layers + 8) + 8 * config.intermediate_size)
    )
    states = 2 * samples * length * config.hidden_size * model.dtype.itemsize
    # Of a layer: float32 and bfloat16, and gradients.
    return held + head + 12 * layer + passes + states + 4 * 4 * LOGITS_AT_ONCE


def tune_scales(
    model: Decoder,
    states: HiddenStates,
    targets: HiddenStates,
    float_head: Tensor | None,
    options: DistillOptions,
    add: Callable[[float], object],
) -> tuple[dict[str, Tensor], float, float]:
    """Tune all scales of a quantized model.

    Args:
        model: all of whose linears are replaced.
        states, targets: the calibration samples in front of the first layer, and what the float
            model makes of them, behind the last.
        float_head: the matrix of the float model's head, where the model's is quantized.
        add: called with shares of the work as they are done, which sum up to 1.

    Returns:
        the scales (N, G) by the linears' names, {} where none are better than those there are; and
        the mean divergence over the samples that are held out, before and after, in nats.
    """
    device, count = states.states.device, len(states.states)
    samples, judging = tuned_samples(count), list(held_out(count))
    bits = max(m.spec.bits for m in model.modules() if isinstance(m, WeightOnlyLinear))
    student = _Student(model, float_head, work_dtype(device, bits))
    factors = [linear.factors for linear in student.scaled.values()]
    adam = torch.optim.Adam(factors, lr=options.rate, betas=(0.9, 0.95))
    batch = min(options.samples(*states.states.shape[1:]), samples)
    draw = torch.Generator().manual_seed(options.seed)
    # A pass over what is held out in front, one behind; a step costs four times its samples'.
    work = 2 * len(judging) + 4 * options.steps * batch

    def mean() -> float:
        total = 0.0
        for chosen in torch.tensor(judging, device=device).split(batch):
            total += _step(student, states, targets, chosen, learn=False)
            add(len(chosen) / work)
        return total / len(judging)

    with torch.enable_grad(), ops.differentiable():
        before, order = mean(), torch.empty(0, dtype=torch.int64)
        for step in range(options.steps):
            if len(order) < batch:
                order = torch.randperm(samples, generator=draw)
            chosen, order = order[:batch], order[batch:]
            _step(student, states, targets, chosen.to(device), learn=True)
            for group in adam.param_groups:
                group["lr"] = options.rate * (1 - step / options.steps)
            adam.step()
            adam.zero_grad()
            add(4 * batch / work)
        after = mean()
    if not after < before:
        return {}, before, after
    return {name: linear.scales() for name, linear in student.scaled.items()}, before, after


def _step(
    student: _Student,
    states: HiddenStates,
    targets: HiddenStates,
    chosen: Tensor,
    *,
    learn: bool,
) -> float:
    """The divergence of some samples, each one's mean, summed up; and its gradients, to learn."""
    model, length = student.model, states.states.shape[1]
    layers = range(len(model.layers))
    x = states.states[chosen].flatten(0, 1).float()
    wanted = targets.states[chosen].flatten(0, 1)
    step = Prefill([length] * len(chosen), None, states.positions, x)
    fronts = []
    for index in layers:
        fronts.append(x)
        x = student.layer(index, x, step)
    top = student.scaled.get("lm_head")
    if top:
        top.begin()
    total, back = 0.0, torch.zeros_like(x)
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        with torch.no_grad():
            theirs = student.head(wanted[part].float(), student.float_head)
        with torch.set_grad_enabled(learn):
            end = x[part].detach().requires_grad_(learn)
            loss = _divergence(student.head(end, model.lm_head), theirs) / length
            if learn:
                (loss / len(chosen)).backward()
                assert end.grad is not None
                back[part] = end.grad
        total += loss.item()
    if top:
        top.end()
    for index in reversed(layers) if learn else ():
        back = student.layer(index, fronts[index], step, back)
    return total
