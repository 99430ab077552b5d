"""Random calibration: the distribution of a layer without a weight, any size, the same by seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, tiny
from quantizing import MODELS
from torch import Tensor

from qllm.calibration import Calibration, calibrate
from qllm.checkpoint.reader import read_raw_config
from qllm.config import ModelConfig
from qllm.layers import Linear
from qllm.models import RawConfig, read_config
from qllm.models.norms import Norm
from qllm.random_model import (
    RandomEmbedding,
    RandomLinear,
    calibrate_random,
    random_model,
)

# config.json of bigscience/bloom and facebook/opt-350m, as published: what shapes depend on.
BLOOM_176B = {
    "model_type": "bloom",
    "n_embed": 14336,
    "n_layer": 70,
    "num_attention_heads": 112,
    "vocab_size": 250880,
}
OPT_350M = {
    "model_type": "opt",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "ffn_dim": 4096,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
    "vocab_size": 50272,
}


def config_of(values: dict) -> ModelConfig:
    return read_config(RawConfig(values, "config.json"))


def tiny_config(family: str) -> ModelConfig:
    return read_config(read_raw_config(tiny(family)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(a: Calibration, b: Calibration) -> None:
    for side in ("inputs", "outputs"):
        one, other = getattr(a, side), getattr(b, side)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_random_linear_has_the_distribution_of_a_gaussian_weight():
    std, count = 0.3, 200_000
    x = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 4.0], [-2.0, -4.0, 2.5], [0.0, 0.1, 0.0]])
    y = RandomLinear(x.shape[1], count, std, generator())(x).double().numpy()
    expected = std**2 * (x @ x.t()).double().numpy()
    # The error of a covariance of n draws is about sqrt(2 / n) of the variances; 6 of these.
    sizes = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    allowed = 6 * np.sqrt(2 / count) * sizes
    assert (np.abs(np.cov(y) - expected) <= allowed).all()
    assert (np.abs(y.mean(axis=1)) <= 6 * np.sqrt(np.diag(expected) / count)).all()
    # Gaussian: the fourth moment is three squared variances, and columns know nothing of others.
    fourth = (y**4).mean(axis=1) / np.diag(expected) ** 2
    np.testing.assert_allclose(fourth, 3, rtol=0.05)
    neighbours = (y[:, :-1] * y[:, 1:]).mean(axis=1) / np.diag(expected)
    assert (np.abs(neighbours) <= 6 / np.sqrt(count)).all()


def test_random_linear_agrees_with_a_real_weight():
    # The statistic that calibration keeps: the largest |y| of a channel over the tokens.
    std, count, x = 0.02, 20_000, torch.randn(16, 64, generator=generator(1))
    weight = torch.randn(count, 64, generator=generator(2)) * std
    real = (x @ weight.t()).abs().amax(dim=0)
    drawn = RandomLinear(x.shape[1], count, std, generator(3))(x).abs().amax(dim=0)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(drawn.quantile(levels), real.quantile(levels), rtol=0.03, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_random_linear_of_tokens_that_depend_on_each_other(scale):
    # More tokens than channels, a token twice, one of zeros: the Gram matrix is singular.
    x = torch.randn(40, 8, generator=generator()) * scale
    x[7], x[9] = x[3], 0
    y = RandomLinear(x.shape[1], 1000, 0.02, generator())(x)
    assert y.shape == (40, 1000) and y.dtype == torch.float32 and y.isfinite().all()
    assert (y[7] - y[3]).abs().max() <= 1e-3 * y[3].abs().max()
    assert y[9].abs().max() <= 1e-12
    spread = y[3].double().std() / (0.02 * x[3].double().norm())
    assert 0.9 < spread < 1.1


def test_random_embedding():
    embedding = RandomEmbedding(50_000, 0.5, generator())
    rows = embedding(torch.tensor([3, 3]))
    assert rows.shape == (2, 50_000) and rows.dtype == torch.float32
    assert abs(rows.std().item() - 0.5) < 0.01 and abs(rows.mean().item()) < 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family(family):
    config = tiny_config(family)
    calibration = calibrate_random(config, samples=2, length=5, seed=0)
    names = {
        f"layers.{i}.{linear}"
        for i in range(config.num_layers)
        for linear in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    }
    assert set(calibration.inputs) == set(calibration.outputs) == {*names, "lm_head"}
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    shapes = {
        "attention.qkv": (kv, hidden),
        "attention.out": (hidden, config.num_heads * config.head_dim),
        "mlp.up": (2 * inner if config.gated_mlp else inner, hidden),
        "mlp.down": (hidden, inner),
    }
    calibration.check({name: shapes[name.split(".", 2)[2]] for name in names})
    for name in names:
        rows, columns = shapes[name.split(".", 2)[2]]
        assert calibration.inputs[name].shape == (columns,)
        assert calibration.outputs[name].shape == (rows,)
    for store in (calibration.inputs, calibration.outputs):
        assert all(v.isfinite().all() and v.max() > 0 for v in store.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_by_seed(family):
    config = tiny_config(family)
    first, again, other = (calibrate_random(config, 2, 5, seed) for seed in (7, 7, 8))
    assert_same(first, again)
    for name in first.inputs:
        assert not torch.equal(first.inputs[name], other.inputs[name])


def test_the_global_seed_is_left_alone():
    config = tiny_config("opt")
    torch.manual_seed(1)
    first, state = calibrate_random(config, 1, 4, 0), torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same(first, calibrate_random(config, 1, 4, 0))


def test_more_samples_widen_the_ranges():
    config = tiny_config("bloom")
    few, many = (calibrate_random(config, samples, 8, 0) for samples in (1, 8))
    assert sum(v.sum() for v in many.inputs.values()) > sum(v.sum() for v in few.inputs.values())


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors of a model, in buffers or not."""
    tensors = {
        id(value): value
        for module in model.modules()
        for value in [*module.__dict__.values(), *module._buffers.values()]
        if isinstance(value, Tensor)
    }
    assert not any(value.is_meta for value in tensors.values())
    return sum(value.nbytes for value in tensors.values())


def test_bloom_176b_takes_no_memory():
    # Its weights are 352 GB; what is held are the norms: 70 · 2 and two more, with biases.
    config = config_of(BLOOM_176B)
    model = random_model(config, length=8, seed=0)
    norms = (70 * 2 + 2) * 2 * 14336 * 4
    assert norms <= held_bytes(model) <= norms + 10_000
    calibration = calibrate(model, [[1, 2, 3]])
    assert calibration.inputs["layers.69.mlp.down"].shape == (57344,)
    assert calibration.outputs["layers.0.attention.qkv"].shape == (3 * 14336,)
    assert calibration.outputs["lm_head"].shape == (250880,)


def test_opt_350m_has_its_projections():
    calibration = calibrate_random(config_of(OPT_350M), 1, 4, 0)
    assert calibration.inputs["project_in"].shape == (512,)
    assert calibration.outputs["project_out"].shape == (512,)


def test_learned_positions_hold_those_in_use():
    config = replace(tiny_config("opt"), max_positions=10**9)
    model = random_model(config, length=6, seed=0)
    assert model.positions.weight.shape == (8, config.hidden_size)
    assert len(calibrate(model, [[1] * 6]).inputs) == 4 * config.num_layers + 1


@pytest.mark.parametrize("fail", [False, True])
def test_calibrate_leaves_no_hooks(fail):
    model = random_model(tiny_config("opt"), length=4, seed=0)
    seen = []

    def progress(samples):
        for sample in samples:
            seen.append(sample)
            yield sample
            if fail:
                raise KeyboardInterrupt

    if fail:
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, [[1, 2], [3]], progress)
    else:
        calibrate(model, [[1, 2], [3]], progress)
    assert seen == ([[1, 2]] if fail else [[1, 2], [3]])
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_are_what_flows_through():
    model = random_model(tiny_config("llama"), length=4, seed=0)
    flows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, module in model.named_modules():
        assert not isinstance(module, Linear)
        if isinstance(module, RandomLinear):
            flows[name] = []
            module.register_forward_hook(
                lambda _, x, y, name=name: flows[name].append((x[0].clone(), y.clone()))
            )
    calibration = calibrate(model, [[5, 6, 7], [8]])
    assert flows.keys() == calibration.inputs.keys()
    for name, calls in flows.items():
        assert len(calls) == 2
        for side, store in enumerate((calibration.inputs, calibration.outputs)):
            largest = np.max([np.abs(call[side].numpy()).max(axis=0) for call in calls], axis=0)
            assert np.array_equal(store[name].numpy(), largest)


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_norm_multiplies_by_one(name):
    """Whatever it adds to its weight; and random samples run through every kind of layer."""
    config = config_of(MODELS[name].to_dict())
    model = random_model(config, 8, seed=0)
    if config.norm_affine:
        x = torch.randn(5, config.hidden_size, generator=generator())
        normed = next(module for module in model.layers.modules() if isinstance(module, Norm))(x)
        torch.testing.assert_close(normed.square().mean(1), torch.ones(5), rtol=1e-2, atol=0)
    assert calibrate_random(config, 2, 8, seed=0).inputs
