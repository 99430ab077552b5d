"""Layers that gradients go through: what they put out, and the gradients."""

from __future__ import annotations

import pytest
import torch
from oracle import load
from quantizing import MODELS, saved

from qllm import ops
from qllm.layers import Linear
from qllm.models.passes import Prefill
from qllm.ops.reference import attention
from qllm.quantizer.tune import FrozenLinear

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, COUNT, STEP = 13, 2, 1e-3


@pytest.mark.parametrize("kernel", ops.KERNELS["differentiable_attention"], ids=lambda k: k.name)
@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_the_kernels(name, kernel, tmp_path, monkeypatch):
    """Gradients along a direction are the difference that a small step in it makes."""
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 5)
    monkeypatch.setattr(ops.differentiable_on("cpu"), "prefill_attention", kernel.run)
    model = load(saved(name, tmp_path / "source"))
    draw = torch.Generator().manual_seed(0)
    shape = (COUNT * LENGTH, model.config.hidden_size)
    x, ahead, behind = (torch.randn(shape, generator=draw) for _ in range(3))
    step = Prefill([LENGTH] * COUNT, None, model.positions, x)
    channels = model.config.num_layers * model.config.layer_inputs
    step.layer_inputs = torch.randn(len(x), channels, generator=draw)
    for layer in model.layers:
        with torch.no_grad():
            expected = layer(x.clone(), step)
            near = [layer(x + sign * STEP * ahead, step).double() for sign in (1, -1)]
        for inner, module in list(layer.named_modules()):
            if isinstance(module, Linear):
                frozen = FrozenLinear(module.dequantize(), module.bias, torch.float32)
                layer.set_submodule(inner, frozen)
        leaf = x.clone().requires_grad_()
        with ops.differentiable():
            found = layer(leaf, step)
            found.backward(behind)
        step.qkv_of = {index: qkv.detach() for index, qkv in step.qkv_of.items()}
        torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-4)
        slope = ((near[0] - near[1]) * behind).sum().item() / (2 * STEP)
        size = leaf.grad.norm() * ahead.norm()
        assert abs((leaf.grad * ahead).sum().item() - slope) < 2e-3 * size.item()


def test_they_are_the_kernels_again_behind_it():
    plain = ops.on("cpu")
    with pytest.raises(ZeroDivisionError), ops.differentiable():
        assert ops.on("cpu") is ops.differentiable_on("cpu") is not plain
        1 / 0  # noqa: B018
    assert ops.on("cpu") is plain
