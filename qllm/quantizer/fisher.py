"""What divergence makes of errors in the states behind each half of a layer: Fisher information.

A model whose states are off by e diverges, to second order, by e^T F e / 2 with
F = E[g g^T], where g is the gradient, by those states, of the log-probability of a token that the
float model itself draws (Martens 2014, arXiv:1412.1193). Squared errors count all directions alike,
of which most hardly reach a prediction. One matrix stands for all tokens, what a token's errors do
to those behind it included, with each token's size taken out, as in `token_errors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qllm import ops
from qllm.checkpoint.weights import Weights
from qllm.config import LM_HEAD
from qllm.folders import writing
from qllm.models.layer import PreNormLayer
from qllm.models.logits import finish_logits
from qllm.models.passes import Prefill
from qllm.quantizer.distill import LOGITS_AT_ONCE
from qllm.quantizer.floats import BACK, FRONT, FloatModel
from qllm.quantizer.hidden import TOKENS_PER_PASS, HiddenStates
from qllm.quantizer.tune import FrozenLinear, freeze_all, token_sizes, tuned_samples, work_dtype

# Tokens whose gradients are looked at: at least, and for each channel.
TOKENS, TOKENS_PER_CHANNEL = 8192, 4
# Of the mean of its diagonal, what is added to a matrix that so many tokens leave uncertain. Tuning
# is as good with 0.05.
DAMP = 0.3


def seen_samples(samples: Sequence[Sequence[int]], channels: int) -> Sequence[Sequence[int]]:
    """The samples that are looked at: of those that are tuned on, as many as have the tokens."""
    enough = -(-max(TOKENS, TOKENS_PER_CHANNEL * channels) // len(samples[0]))
    return samples[: min(tuned_samples(len(samples)), enough)]


def write_fisher(
    weights: Weights,
    samples: Sequence[Sequence[int]],
    path: Path,
    device: str,
    add: Callable[[float], object],
    seed: int = 0,
) -> None:
    """Write a matrix for each block of each layer, of which `read_metric` makes a metric.

    One layer is in memory at a time, and the states behind all blocks of a few samples.

    Args:
        weights: the float model's.
        samples: token ids, of one length.
        path: of the file, float32 (blocks, C, C); one that is there is replaced.
        add: called with shares of the work as they are done, which sum up to 1.
        seed: of the tokens that are drawn.
    """
    config = weights.config
    layers = FloatModel(weights, device).model.layers
    sums = _new_file(path, sum(len(layer.blocks()) for layer in layers), config.hidden_size)
    draw = torch.Generator(device).manual_seed(seed)
    per_pass = max(1, TOKENS_PER_PASS // len(samples[0]))
    for start in range(0, len(samples), per_pass):
        part = samples[start : start + per_pass]

        def add_share(share: float, size: float = len(part) / len(samples)) -> None:
            add(share * size)

        _Pass(weights, device, part, draw).add_to(sums, add_share)
    sums.flush()


def read_metric(path: Path, block: int, channels: int) -> Tensor:
    """The matrix M (C, C), float32, by which errors behind a block count; mean diagonal 1.

    Args:
        block: its number, those of all layers in front counted.
    """
    size = channels**2
    matrix = np.fromfile(path, np.float32, size, offset=4 * block * size)
    metric = torch.from_numpy(matrix).view(channels, channels)
    mean = metric.diagonal().mean()
    if not (mean > 0 and mean.isfinite()):  # nothing behind it depends on it
        return torch.eye(channels)
    metric /= mean * (1 + DAMP)
    metric.diagonal().add_(DAMP / (1 + DAMP))
    return metric


def draw_tokens(p: Tensor, draw: torch.Generator) -> Tensor:
    """A token for each row of probabilities (N, V): int64 (N, 1).

    `torch.multinomial` draws a number for each probability, which takes six times as long.
    """
    below = p.cumsum(-1)
    threshold = torch.rand(len(p), 1, device=p.device, generator=draw) * below[:, -1:]
    # The first that reaches beyond the threshold: one that is more than zero.
    return torch.searchsorted(below, threshold, right=True).clamp_(max=p.shape[1] - 1)


def _new_file(path: Path, blocks: int, channels: int) -> np.memmap:
    """A file of zeros in the place of what is there, which the disk has room for."""
    path.unlink(missing_ok=True)
    with writing(path), path.open("wb") as file:
        # A hole that there is no room for would end the process where it is written to.
        os.posix_fallocate(file.fileno(), 0, 4 * blocks * channels**2)
    return np.memmap(path, np.float32, "r+", shape=(blocks, channels, channels))


class _Pass:
    """Some samples' way through the float model, and their gradients' way back."""

    def __init__(
        self, weights: Weights, device: str, samples: Sequence[Sequence[int]], draw: torch.Generator
    ) -> None:
        self.weights, self.device, self.draw = weights, device, draw
        self.samples = samples
        self.dtype = work_dtype(torch.device(device), bits=1)

    def add_to(self, sums: np.ndarray, add: Callable[[float], object]) -> None:
        """Add g g^T of all tokens behind each block, with each token's size taken out."""
        floats = FloatModel(self.weights, self.device)
        for module in FRONT:
            floats.fill(module, mapped=True)
        model, length = floats.model, len(self.samples[0])
        front = HiddenStates.embed(model, self.samples, torch.float32)
        x = front.states.flatten(0, 1)
        step = Prefill([length] * len(self.samples), None, model.positions, x)
        states, layers = [x], len(model.layers)
        with ops.differentiable():
            for index in range(layers):
                for run, _ in self._layer(floats, index).blocks():
                    states.append(run(states[-1], step))
                add(1 / 3 / layers)
            back = self._through_head(floats, states[-1])
            again, block = FloatModel(self.weights, self.device), len(sums)
            for index in reversed(range(layers)):
                for run, _ in reversed(self._layer(again, index).blocks()):
                    scaled = back * token_sizes(states.pop())[:, None].sqrt()
                    block -= 1
                    sums[block] += ops.multiply(scaled.t(), scaled.t()).cpu().numpy()
                    if block:
                        given = states[-1].detach().requires_grad_()
                        with torch.enable_grad():
                            run(given, step).backward(back)
                        assert given.grad is not None
                        back = given.grad
                add(2 / 3 / layers)

    def _layer(self, floats: FloatModel, index: int) -> PreNormLayer:
        floats.fill_layer(index, mapped=True)
        layer = floats.model.layers[index]
        freeze_all(layer, self.dtype)
        floats.drop([f"layers.{index}"])
        return layer

    def _through_head(self, floats: FloatModel, x: Tensor) -> Tensor:
        """The gradient (N, C) of the log-probability of a token drawn behind each."""
        for module in BACK[:-1]:
            floats.fill(module, mapped=True)
        model = floats.model
        behind = nn.Sequential(model.final_norm, model.project_out)
        freeze_all(behind, self.dtype)
        linear = floats.linear(LM_HEAD)
        head = FrozenLinear(linear.weight, linear.bias, self.dtype)
        rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
        parts = []
        for part in x.split(rows):
            end = part.detach().requires_grad_()
            with torch.enable_grad():
                logits = finish_logits(model.config, head(behind(end)), torch.float32)
            p = logits.detach().softmax(-1)
            drawn = draw_tokens(p, self.draw)
            logits.backward(p.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=p.dtype)))
            assert end.grad is not None
            parts.append(end.grad)
        return torch.cat(parts)
