"""The search of the clipping range against brute force in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_rtn import exact_scale, groups_of

from qllm.config import SCHEMES
from qllm.quant import rtn
from qllm.quant.clip import SHRINK, clipped_qparams, clipped_qparams_for
from qllm.quant.rtn import fake_quantize, minmax_qparams, quantize_rtn

pytestmark = pytest.mark.usefixtures("one_thread")

GROUP_SIZES = (-1, 1, 8, 20, 64)
COLUMNS = 67  # prime: there is a last, shorter group


def drawn(rows: int = 30, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Weights with outliers, which a narrower grid leaves out."""
    values = np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.02
    return torch.from_numpy(values.astype(np.float32))


def hessian_of(columns: int = COLUMNS, tokens: int = 200, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(columns, generator=generator).exp()
    x = torch.randn(tokens, columns, generator=generator) * sizes
    x += 0.5 * x.roll(1, dims=1)
    return x.t() @ x / tokens


def apart(hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """Inputs whose groups are not correlated: the output errors of groups add up."""
    return torch.block_diag(*(hessian[s, s] for s in groups_of(len(hessian), group_size)))


def losses(
    group: np.ndarray, scale: np.ndarray, low: np.ndarray, bits: int, scheme: str, block: np.ndarray
) -> np.ndarray:
    """e H e^T of each row of a group (N, g) on a grid, float64 (N,).

    The ends of a symmetric grid are ties: they round as float32 has them.
    """
    top = 2**bits - 1
    zero = np.full(len(group), 2 ** (bits - 1))
    if scheme == "asym":
        zero = np.clip(np.rint(-low / scale), 0, top)
    scale, zero = scale[:, None], zero[:, None]
    q = np.clip(np.rint(group / scale) + zero, 0, top) - zero
    error = q.astype(np.float64) * scale - group
    return np.einsum("ni,ij,nj->n", error, block, error)


def ends(group: np.ndarray, bits: int, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """The full range of a group: scale and lower end of each row, float32."""
    scale = exact_scale(group.astype(np.float64), bits, scheme).astype(np.float32)
    return scale, np.minimum(group.min(axis=1), 0)


@pytest.mark.covering(1)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("of", ["weights", "outputs"])
def test_no_range_that_is_tried_is_better(of, bits, group_size, scheme):
    weight = drawn(seed=bits)
    hessian = torch.eye(COLUMNS) if of == "weights" else apart(hessian_of(), group_size)
    search = clipped_qparams if of == "weights" else clipped_qparams_for(hessian)
    scales, min_vals = (tensor.numpy() for tensor in search(weight, bits, group_size, scheme))
    spans = groups_of(COLUMNS, group_size)
    assert scales.shape == min_vals.shape == (len(weight), len(spans))
    clipped = 0
    for index, span in enumerate(spans):
        group = weight[:, span].numpy()
        block = hessian[span, span].double().numpy()
        rest = (bits, scheme, block)
        full, full_min_vals = ends(group, bits, scheme)
        tried = [losses(group, full * s, full_min_vals * s, *rest) for s in SHRINK]
        got = losses(group, scales[:, index], min_vals[:, index], *rest)
        # The search computes in float32, where the errors of 8 bits are small differences.
        slack = (1e-3 if bits == 8 else 1e-5) * tried[0] + 1e-12
        best = got <= np.min(tried, axis=0) + slack
        # A row whose grids as stored gain nothing keeps its full range.
        assert best.all() if of == "weights" else best.mean() > 0.8
        assert (got <= tried[0] + slack).all()
        # It is one of those that are tried: the full range shrunk, both ends alike.
        share = scales[:, index] / full
        assert np.abs(share[:, None] - np.array(SHRINK)).min(axis=1).max() < 1e-5
        if scheme == "asym":
            assert np.allclose(min_vals[:, index], full_min_vals * share, rtol=1e-5, atol=1e-9)
        clipped += (share < 0.99).sum()
    if bits in (2, 3, 4) and group_size in (-1, 64):
        assert clipped > len(weight) / 2


def test_the_full_range_comes_first():
    assert SHRINK[0] == 1
    assert sorted(SHRINK, reverse=True) == list(SHRINK)
    assert SHRINK[-1] > 0.2


def test_where_nothing_is_gained_the_range_is_whole():
    # Each weight is a value of its grid.
    weight = torch.tensor([[-2.0, 5.5, 0.0, 0.5, 1.5, 1.0], [0.0] * 6])
    for search in (clipped_qparams, clipped_qparams_for(hessian_of(6))):
        scales, min_vals = search(weight, 4, -1, "asym")
        assert scales.tolist() == [[0.5], [1.0]]
        assert min_vals.tolist() == [[-2.0], [0.0]]


def test_without_inputs_the_range_is_whole():
    weight = drawn()
    found = clipped_qparams_for(torch.zeros(COLUMNS, COLUMNS))(weight, 3, 20, "asym")
    for got, expected in zip(found, minmax_qparams(weight, 3, 20, "asym"), strict=True):
        assert torch.equal(got, expected)


def output_error(matrix: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (matrix - weight).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_rounded_on_the_grids_gains(bits, scheme):
    weight, hessian = drawn(200, seed=5), hessian_of()
    identity = torch.eye(COLUMNS)
    for search, kind in ((clipped_qparams, identity), (clipped_qparams_for(hessian), hessian)):
        plain, clipped = (
            output_error(fake_quantize(weight, bits, 20, scheme, find_qparams), weight, kind)
            for find_qparams in (None, search)
        )
        assert clipped < plain * (0.97 if kind is identity else 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [8, 20])
def test_no_row_loses_by_what_its_groups_have_in_common(bits, group_size):
    # Every channel moves with all others: errors towards zero add up.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 1, generator=generator) + torch.randn(500, COLUMNS, generator=generator)
    weight, hessian = drawn(50).abs(), x.t() @ x
    form = (bits, group_size, "asym")

    def of_rows(find_qparams) -> torch.Tensor:
        error = (fake_quantize(weight, *form, find_qparams) - weight).double()
        return ((error @ hessian.double()) * error).sum(1)

    full, alone, found = map(of_rows, (None, clipped_qparams, clipped_qparams_for(hessian)))
    assert (alone > full).any()  # such rows there are
    assert (found <= full * (1 + 1e-5)).all() and found.sum() < full.sum()


@pytest.mark.parametrize("chunk", [1, 100, 500])
@pytest.mark.parametrize("search", [clipped_qparams, clipped_qparams_for(hessian_of())])
def test_the_size_of_a_piece_does_not_show(monkeypatch, search, chunk):
    weight = drawn(11)
    whole = quantize_rtn(weight, 3, 16, "asym", search)
    monkeypatch.setattr(rtn, "CHUNK_ELEMENTS", chunk)
    for got, expected in zip(
        quantize_rtn(weight, 3, 16, "asym", search)[:3], whole[:3], strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_grid_that_is_found_is_the_one_that_is_stored(scheme):
    weight = drawn()
    scales, _ = clipped_qparams(weight, 4, 20, scheme)
    packed = quantize_rtn(weight, 4, 20, scheme, clipped_qparams)
    assert torch.equal(packed.scales, scales.half())
    assert not torch.equal(packed.scales, quantize_rtn(weight, 4, 20, scheme).scales)
