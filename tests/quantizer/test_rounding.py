"""Tuned roundings: where they start, where a step takes them, and how far they may go."""

from __future__ import annotations

import pytest
import torch
from covering import each

from qllm.ops.reference import dequantize
from qllm.quant.algorithm import TuningStart
from qllm.quant.gptq import GPTQOptions, quantize_gptq
from qllm.quant.packing import PackedWeight, group_width, unpack
from qllm.quant.rtn import quantize_rtn
from qllm.quantizer import rounding
from qllm.quantizer.rounding import TunedRounding

ROWS, COLUMNS = 12, 70  # of which neither 16 nor 32 is a divisor


@pytest.fixture(autouse=True)
def _in_pieces(monkeypatch):
    monkeypatch.setattr(rounding, "WEIGHTS_AT_ONCE", 5 * COLUMNS)


def drawn(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def start(bits: int, group_size: int, scheme: str, algorithm: str) -> TuningStart:
    """The matrix of seed 0 by an algorithm; "act-order" gives groups that are no runs."""
    if algorithm == "rtn":
        return TuningStart(quantize_rtn(drawn(), bits, group_size, scheme), drawn())
    x = drawn(1) @ torch.diag(torch.linspace(0.1, 3, COLUMNS))
    options = GPTQOptions(static_groups=algorithm == "gptq")
    rounded = torch.empty(ROWS, COLUMNS)
    form = bits, group_size, scheme, options
    return TuningStart(quantize_gptq(drawn(), x.t() @ x, *form, compensated=rounded)[0], rounded)


def values(packed: PackedWeight, bits: int, group_size: int) -> torch.Tensor:
    """What a packed matrix stands for, by the specification."""
    columns = dequantize(*packed[:3], bits, group_size, COLUMNS, torch.float32)
    if packed.perm is None:
        return columns
    return torch.empty_like(columns).index_copy_(1, packed.perm, columns)


@pytest.mark.parametrize(
    ("bits", "group_size", "scheme", "algorithm"),
    [
        (bits, *rest)
        for bits, rest in zip(
            (1, 2, 3, 4, 5, 8) * 2,
            each((-1, 16, 32), ("asym", "sym"), ("rtn", "gptq", "act-order")) * 2,
            strict=False,
        )
        if bits > 1 or rest[1] == "asym"
    ],
)
def test_it_starts_from_what_an_algorithm_found(bits, group_size, scheme, algorithm):
    packed, weight = start(bits, group_size, scheme, algorithm)
    tuned = TunedRounding(packed, weight, bits, group_size)
    assert torch.equal(tuned.dequantize(), values(packed, bits, group_size))
    for ours, theirs in zip(tuned.packed(), packed, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("algorithm", ["gptq", "act-order"])
def test_what_gptq_rounds_is_nearest_to_what_it_takes(algorithm):
    """And another than the matrix: it makes up for the errors before it."""
    (packed, weight), bits = start(3, 16, "asym", algorithm), 3
    group, perm = (
        torch.arange(COLUMNS) // 16,
        slice(None) if packed.perm is None else packed.perm,
    )
    scales, zeros = packed.scales.float()[:, group], packed.qzeros.float()[:, group]
    nearest = (weight[:, perm] / scales).round() + zeros
    assert torch.equal(nearest.clamp(0, 7), unpack(packed.qweight, bits, COLUMNS).float())
    changed = (weight != drawn()).any(0)
    assert changed.sum() == COLUMNS - 1  # all but the first


def straight_through(
    tuned: TunedRounding, bits: int, group_size: int, scheme: str
) -> tuple[torch.Tensor, ...]:
    """The same matrix in plain autograd: offsets (N, K), factors (N, G) of both ends, and it."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x + (x.round() - x).detach()

    ideal = tuned.state.ideal.flatten(1)[:, :COLUMNS]
    offsets = torch.zeros_like(ideal).requires_grad_()
    ends = [tuned.state.factors[end].clone().requires_grad_() for end in (0, 1)]
    low, high = tuned.state.low * ends[0], tuned.state.high * ends[0 if scheme == "sym" else 1]
    top = 2**bits - 1
    scales = (high - low) / top
    zeros = rounded(-low / scales)
    group = group_width(COLUMNS, group_size)
    wide = [part.repeat_interleave(group, 1)[:, :COLUMNS] for part in (scales, zeros)]
    q = (rounded(ideal / wide[0] + offsets) + wide[1]).clamp(0, top)
    return offsets, *ends, (q - wide[1]) * wide[0]


@pytest.mark.parametrize("scheme", ["asym", "sym"])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_a_step_goes_against_the_signs_of_gradients(scheme, group_size):
    bits, rate, range_rate = 3, 0.25, 0.125
    tuned = TunedRounding(*start(bits, group_size, scheme, "rtn"), bits, group_size)
    tuned.state.factors.mul_(0.7)  # so that some weights are beyond the ends
    # Scales that float16 holds make no difference to the gradients.
    tuned.state = tuned.state._replace(dtype=torch.float32)
    offsets, low, high, matrix = straight_through(tuned, bits, group_size, scheme)
    torch.testing.assert_close(matrix, tuned.dequantize())
    gradient = drawn(2)
    (matrix * gradient).sum().backward()
    before = tuned.state.ideal.clone(), tuned.state.factors.clone()
    scales = ((tuned.state.high - tuned.state.low) * 0.7 / (2**bits - 1))[..., None]
    tuned.step(gradient[None].clone(), rate, range_rate, matrix.detach())
    moved = ((tuned.state.ideal - before[0]) / scales).flatten(1)[:, :COLUMNS] / rate
    torch.testing.assert_close(moved, -offsets.grad.sign(), atol=1e-5, rtol=0)
    assert torch.equal(matrix, tuned.dequantize())
    moved = (tuned.state.factors - before[1]) / range_rate
    ends = (low, low) if scheme == "sym" else (low, high)
    for end, factor in zip(moved, ends, strict=True):
        torch.testing.assert_close(end, -factor.grad.sign())
    assert (offsets.grad == 0).any() and (offsets.grad != 0).any()


@pytest.mark.parametrize("bits", [2, 4])
def test_no_integer_leaves_its_neighbours(bits):
    packed, weight = start(bits, 16, "asym", "rtn")
    tuned = TunedRounding(packed, weight, bits, 16)
    for seed in range(5):
        tuned.step(drawn(seed)[None], 0.1, 0.0, torch.empty(ROWS, COLUMNS))
    found = tuned.packed()
    moved = unpack(found.qweight, bits, COLUMNS).int() - unpack(packed.qweight, bits, COLUMNS).int()
    assert set(moved.unique().tolist()) == {-1, 0, 1}
    assert torch.equal(found.scales, packed.scales) and torch.equal(found.qzeros, packed.qzeros)


def test_ranges_stay_such_as_can_be_stored():
    tuned = TunedRounding(quantize_rtn(drawn() * 1e-4, 4, 16, "asym"), drawn() * 1e-4, 4, 16)
    for _ in range(20):
        tuned.step(tuned.dequantize()[None], 0.0, 0.2, torch.empty(ROWS, COLUMNS))
    packed = tuned.packed()
    assert packed.scales.dtype == torch.float16 and (packed.scales > 0).all()
    assert torch.equal(values(packed, 4, 16), tuned.dequantize())


def test_weights_that_are_all_zero_stay_zero():
    zeros = torch.zeros(ROWS, COLUMNS)
    tuned = TunedRounding(quantize_rtn(zeros, 4, 16, "asym"), zeros, 4, 16)
    for seed in range(3):
        tuned.step(drawn(seed)[None], 0.15, 0.0, torch.empty(ROWS, COLUMNS))
    assert not tuned.dequantize().any()
