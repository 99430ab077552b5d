"""SmoothQuant's scales against the paper's formula in float64, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qllm.quant.smooth import DEFAULT_ALPHA, smooth_scales


def test_by_hand():
    # 16^0.5 / 4^0.5 = 2, and 1^0.5 / 0.25^0.5 = 2.
    weight = torch.tensor([[4.0, 0.25], [-1.0, -0.125]])
    assert smooth_scales(torch.tensor([16.0, 1.0]), weight).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_against_the_formula(alpha, dtype):
    random = np.random.default_rng(0)
    inputs = torch.from_numpy(random.uniform(0.01, 50, 37).astype(np.float32))
    weight = torch.from_numpy(random.standard_normal((11, 37)).astype(np.float32)).to(dtype)
    largest = np.abs(weight.double().numpy()).max(axis=0)
    expected = inputs.double().numpy() ** alpha / largest ** (1 - alpha)
    scales = smooth_scales(inputs, weight, alpha)
    assert scales.dtype == torch.float32
    np.testing.assert_allclose(scales.numpy(), expected, rtol=1e-5)


def test_the_paper_s_alpha_is_the_default():
    inputs, weight = torch.tensor([3.0, 5.0]), torch.tensor([[0.5, 7.0]])
    assert DEFAULT_ALPHA == 0.5
    assert torch.equal(smooth_scales(inputs, weight), smooth_scales(inputs, weight, 0.5))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_stay(alpha):
    weight = torch.tensor([[0.0, 2.0, 0.0], [0.0, -3.0, 0.0]])
    scales = smooth_scales(torch.tensor([4.0, 0.0, 0.0]), weight, alpha)
    assert scales.tolist() == [1.0, 1.0, 1.0]


def test_ranges_of_both_sides_meet_at_one_half():
    # With alpha 0.5, inputs / s and weight · s have the same largest value in each channel.
    inputs = torch.tensor([100.0, 1.0, 0.01])
    weight = torch.tensor([[0.5, -0.5, 0.1], [0.25, 0.1, -0.3]])
    scales = smooth_scales(inputs, weight)
    torch.testing.assert_close(inputs / scales, (weight * scales).abs().amax(dim=0))


@given(
    seed=st.integers(0, 2**32 - 1),
    alpha=st.floats(0, 1),
    exponent=st.integers(-30, 30),
)
def test_scales_are_positive_and_finite(seed, alpha, exponent):
    random = np.random.default_rng(seed)
    inputs = torch.from_numpy(random.uniform(0, 1, 9).astype(np.float32) * 2.0**exponent)
    weight = torch.from_numpy(random.standard_normal((4, 9)).astype(np.float32) * 2.0**-exponent)
    inputs[random.integers(9)] = 0
    weight[:, random.integers(9)] = 0
    scales = smooth_scales(inputs, weight, alpha)
    assert scales.isfinite().all() and (scales > 0).all()
