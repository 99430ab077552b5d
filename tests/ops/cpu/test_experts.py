"""The experts of a step in one call: to the bits of one expert after the other, on every path."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from covering import pairwise
from cpu_paths import DTYPES, on

from qllm.config import ExpertsConfig, ModelConfig, QuantSpec
from qllm.layers import Linear, linear_class
from qllm.models.mlp import MixtureOfExperts, make_mlp
from qllm.ops import phase, reference
from qllm.ops.cpu import library as native
from qllm.ops.cpu import steps
from qllm.ops.cpu.capture import capture_calls
from qllm.ops.cpu.experts import ROWS

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN, INNER, COUNT, TOP_K = 48, 40, 5, 2
SPECS = {
    "16": QuantSpec(),
    "4": QuantSpec(4, 16, "asym", "weight_only"),
    "8:tc-li": QuantSpec(8, -1, "sym", "w8a8_dynamic"),
}


def mixture(
    bitwidth: str, dtype: torch.dtype, *, shared: bool = True, last: str | None = None
) -> MixtureOfExperts:
    """One of random weights.

    Args:
        last: the bitwidth of the last expert, where it is another one.
    """
    # The shared one is wider, as released ones are: memory between its calls is, too.
    experts = ExpertsConfig(COUNT, TOP_K, INNER, True, (True,), 3 * INNER if shared else 0)
    config = ModelConfig(
        "made", 9, HIDDEN, 1, 4, 4, 12, INNER, HIDDEN, 9, "rope", "rmsnorm", 1e-6, "silu",
        gated_mlp=True, mlp_bias=False, experts=experts,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def make(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype) / 4
        router = name.endswith(("router", "shared_gate"))
        other = last is not None and f".{COUNT - 1}." in name
        spec = SPECS["16" if router else last if other else bitwidth]
        linear = linear_class(spec).from_float(weight, None, spec, input_range=None)
        linear.process_weights_after_loading()
        return linear

    found = make_mlp(config, 0, dtype, make)
    assert isinstance(found, MixtureOfExperts)
    return found


def one_by_one(mlp: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The same by Python, as where processes share the experts."""
    y = torch.empty_like(x)
    with phase.decode():
        gate = None if mlp.shared_gate is None else mlp.shared_gate(x)
        weights, chosen = steps.route(mlp.router(x), gate, TOP_K, normalizes=True)
        mlp._mix(x, weights, chosen, y)
    return y


def step(mlp: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    with phase.decode():
        return mlp(x)


def tokens(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("path", native.PATHS)
@pytest.mark.parametrize(("bitwidth", "dtype", "shared"), pairwise(SPECS, DTYPES, (True, False)))
def test_one_call_is_one_expert_after_the_other(path, bitwidth, dtype, shared):
    with on(path):
        mlp = mixture(bitwidth, dtype, shared=shared)
        for rows in (1, 3, 2 * ROWS + 5):  # of which more than ROWS take an expert
            x = tokens(rows, dtype)
            found = step(mlp, x)
            assert mlp._calls[dtype] is not None
            assert torch.equal(found, one_by_one(mlp, x))
            assert torch.equal(found, torch.cat([step(mlp, row) for row in x.split(1)]))


def test_it_is_what_the_experts_give():
    mlp, x = mixture("16", torch.float32), tokens(7, torch.float32)
    gate = mlp.shared_gate(x)
    weights, chosen = reference.route(mlp.router(x), gate, TOP_K, normalizes=True)
    given = torch.stack([each(x).double() for each in mlp.mlps()])  # (E + 1, N, C)
    want = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for row in range(7):
        for weight, expert in zip(weights[row].double(), chosen[row], strict=True):
            want[row] += weight * given[expert, row]
    for found in (step(mlp, x), mlp(x)):
        assert (found - want).abs().max() < 1e-5 * want.abs().max()


def test_a_captured_step_chooses_anew():
    mlp, x = mixture("4", torch.float32), tokens(3, torch.float32)
    with capture_calls() as calls:
        y = step(mlp, x)
    assert calls.graph_break is None and not calls.calls_back
    first = y.clone()
    x.copy_(tokens(4, torch.float32)[1:])
    want = one_by_one(mlp, x)
    calls.replay()
    assert torch.equal(y, want) and not torch.equal(y, first)


def test_experts_that_make_other_calls_are_run_one_by_one():
    mlp, x = mixture("4", torch.float32, last="16"), tokens(4, torch.float32)
    found = step(mlp, x)
    assert mlp._calls[torch.float32] is None
    assert torch.equal(found, one_by_one(mlp, x))
    with capture_calls() as calls:
        y = step(mlp, x)
    assert calls.graph_break is None and calls.calls_back
    y.zero_()
    calls.replay()
    assert torch.equal(y, found)


def test_calls_are_not_what_is_copied_or_pickled():
    mlp, x = mixture("4", torch.float32), tokens(2, torch.float32)
    want = step(mlp, x)
    for other in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert not other._calls
        assert torch.equal(step(other, x), want)


def test_a_router_of_many_experts():
    """The first of equal ones, all that there are, and what is no number."""
    logits = torch.zeros(3, 4096)
    logits[1, 4000:] = 1.0
    logits[2, 7] = torch.nan
    for route in (steps.route, reference.route):
        weights, chosen = route(logits, None, 3, normalizes=True)
        assert chosen[:2].tolist() == [[0, 1, 2], [4000, 4001, 4002]]
        assert weights[:2].allclose(torch.tensor(1 / 3)) and weights[2].isnan().all()
        whole, every = route(logits[:1], None, 4096, normalizes=False)
        assert whole.sum() == pytest.approx(1, abs=1e-5)
        assert every[0].sort().values.equal(torch.arange(4096))
