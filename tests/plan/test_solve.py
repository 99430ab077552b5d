"""The solver against all choices there are, and against dynamic programming."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from qllm.plan import solve as solver
from qllm.plan.problem import Problem, UnsolvedError
from qllm.plan.solve import orders, solve


def problem(seed: int, devices: int, layers: int, candidates: int = 2, **changes) -> Problem:
    """A problem of random sizes, with one linear to a half of a layer."""
    draw = np.random.default_rng(seed)
    linears = halves = 2 * layers
    weights = draw.integers(50, 200, linears).astype(float)
    bits = np.array([2.0, 4.0, 8.0])[:candidates]
    nbytes = weights[:, None] * bits / 8
    speed = draw.uniform(1, 4, devices)
    loss = np.exp(draw.normal(size=linears))[:, None] * 4.0**-bits
    fixed = draw.uniform(1, 5, halves)
    total = nbytes[:, 1].sum() + fixed.sum()
    memory = np.full(devices, np.inf) if devices == 1 else total * draw.uniform(0.5, 0.8, devices)
    return Problem(
        half_of=np.arange(halves),
        loss=loss,
        nbytes=nbytes,
        weights=weights,
        bits=np.tile(bits, (linears, 1)),
        fixed_bytes=fixed,
        memory=memory,
        buffers=3.0,
        prefill=draw.uniform(1, 2, (devices, linears, 1)) * weights[:, None] / speed[:, None, None]
        + np.zeros((devices, linears, candidates)),
        decode=nbytes[None] / speed[:, None, None],
        fixed_prefill=draw.uniform(0, 1, (devices, halves)),
        fixed_decode=draw.uniform(0, 1, (devices, halves)),
        passes=draw.uniform(0, 2, (2, devices)),
        stage_passes=draw.uniform(0, 2, (2, 2, devices)),
        crowding=draw.uniform(0, 2, (2, 2, devices)),
        contention=draw.uniform(0, 0.5, devices),
        shares=np.zeros((0, devices)),
        steps=3,
        **{
            "hop_prefill": 2.0,
            "hop_decode": 0.5,
            "micro_batches": devices,
            "prompt_batches": changes.get("micro_batches", devices),
            **changes,
        },
    )


def all_values(p: Problem):
    """The value of each choice that keeps to the limits."""
    linears, candidates = p.loss.shape
    devices, halves = len(p.memory), p.halves
    for cuts in itertools.combinations_with_replacement(range(halves + 1), devices - 1):
        device = np.searchsorted(np.array(cuts), np.arange(halves), side="right")
        for choice in itertools.product(range(candidates), repeat=linears):
            costs = p.evaluate(np.array(choice), device)
            fits = (costs.held <= p.memory + 1e-9).all()
            fits = fits and (p.max_loss is None or costs.loss <= p.max_loss)
            fits = fits and (p.max_bits is None or costs.bits <= p.max_bits + 1e-9)
            if p.allowed is not None:
                fits = fits and p.allowed[np.arange(linears), list(choice)].all()
            if fits:
                yield p.value(costs)


OBJECTIVES = ("loss", "bytes", "latency", "throughput")


@pytest.mark.covering(2)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("devices", "layers"), [(1, 4), (2, 3), (3, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_the_best_of_all_choices(objective, devices, layers, seed):
    p = problem(seed, devices, layers, objective=objective)
    limit = p.loss[:, 0].sum() * 0.3 if objective != "loss" else None
    max_bits = 3.1 if objective == "loss" and devices == 1 else None
    p = problem(seed, devices, layers, objective=objective, max_loss=limit, max_bits=max_bits)
    found = solve(p)
    assert found.value == pytest.approx(min(all_values(p)), rel=2e-4)
    assert (found.costs.held <= p.memory + 1e-6).all()
    assert (np.diff(found.device) >= 0).all()
    assert found.gap <= 2e-4


@pytest.mark.covering(2)
@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize(("micro_batches", "prompt_batches"), [(1, 1.0), (3, 2.0)])
@pytest.mark.parametrize(
    "shares",
    [
        [0.5, 1.0, 0.5],  # a machine that all three make crowded, or one with the large one
        [0.0, 1.0, 1.0],  # two devices that have all of one, behind another
        [0.75, 0.25, 0.25],
        [0.4, 0.4, 0.4],
    ],
)
@pytest.mark.parametrize("memory", [0.4, 0.6])  # three devices hold it all, and two
def test_machines_that_devices_share(objective, micro_batches, prompt_batches, shares, memory):
    batches = {"micro_batches": micro_batches, "prompt_batches": prompt_batches}
    p = problem(2, 3, 2, objective=objective, **batches)
    limit = p.loss[:, 0].sum() * 0.5
    total = p.nbytes[:, 1].sum() + p.fixed_bytes.sum()
    p = replace(
        p,
        memory=np.full(3, total * memory),
        shares=np.array([shares]),
        max_loss=limit,
    )
    found = solve(p)
    assert found.value == pytest.approx(min(all_values(p)), rel=2e-4) and found.gap <= 2e-4
    alone = replace(p, shares=np.zeros((0, 3)))
    assert p.value(found.costs) >= min(all_values(alone)) * (1 - 2e-4)


@pytest.mark.parametrize("decided", [False, True])
@pytest.mark.parametrize(("seed", "memory"), [(0, 0.42), (2, 0.5), (4, 0.5), (3, 1.2)])
def test_both_ends_have_a_tied_embedding(decided, seed, memory):
    p = problem(seed, 3, 2, objective="throughput")
    half_of = p.half_of.copy()
    half_of[0] = p.halves - 1  # it is multiplied with behind the last layer
    total = p.nbytes[:, 1].sum() + p.fixed_bytes.sum()
    p = replace(
        p,
        half_of=half_of,
        memory=np.full(3, total * memory),
        max_loss=p.loss[:, 0].sum() * 0.5,
        **({"tied": 0} if decided else {"tied_bytes": float(p.nbytes[0, 1])}),
    )
    found = solve(p)
    assert found.value == pytest.approx(min(all_values(p)), rel=2e-4) and found.gap <= 2e-4
    assert (found.costs.held <= p.memory + 1e-6).all()
    # What each device has, summed by hand.
    held = np.zeros(3)
    for linear, candidate in enumerate(found.choice):
        held[found.device[half_of[linear]]] += p.nbytes[linear, candidate]
    for half, device in enumerate(found.device):
        held[device] += p.fixed_bytes[half]
    held[np.unique(found.device)] += p.buffers
    if found.device[0] != found.device[-1]:
        held[found.device[0]] += p.nbytes[0, found.choice[0] if decided else 1]
    assert found.costs.held == pytest.approx(held)


def test_stages_of_one_machine_do_not_add_up():
    """By hand: two stages of 3 and 1 s with two threads each, on two processors or four.

    Passes of the second take 2.5 s more in steps while both work, and those of the first half a
    second of prompts; the second waits for half of what the first one reads. One device alone would
    take 9 s more.
    """
    base = problem(0, 2, 1, hop_prefill=0.0, hop_decode=0.0)
    stage_passes, crowding = np.zeros((2, 2, 2, 2))
    stage_passes[:, 1] = (0.5, 0.0), (0.0, 2.5)
    crowding[1, 0] = 0.25, 0.5
    p = replace(
        base,
        decode=np.array([3.0, 1.0])[:, None, None] * np.ones((2, 2, 2)),
        prefill=np.array([3.0, 1.0])[:, None, None] * np.ones((2, 2, 2)),
        fixed_decode=np.zeros((2, 2)),
        fixed_prefill=np.zeros((2, 2)),
        passes=np.full((2, 2), 9.0),
        stage_passes=stage_passes,
        crowding=crowding,
        contention=np.array([0.0, 0.5]),
    )
    choice, device = np.zeros(2, dtype=int), np.array([0, 1])
    on_four, on_two = (
        replace(p, shares=np.full((1, 2), share)).evaluate(choice, device) for share in (0.5, 1.0)
    )
    assert (on_four.prefill, on_four.decode) == (4 + 3.5, 2 * 5.0)
    assert on_four.slowest == 2 * (3.5 + 3 * 5.0)
    assert (on_two.prefill, on_two.decode) == (4 + 4.5, 2 * 7.0)
    assert on_two.slowest == 2 * (4.5 + 3 * 7.0)
    one = {"micro_batches": 1, "prompt_batches": 1.0}
    crowded = replace(p, shares=np.array([[0.25, 1.0]]), **one)
    assert crowded.evaluate(choice, device).decode == 4.25
    stage_passes[:, 1] = crowding[:, 1] = 9.0
    one_at_a_time = replace(crowded, stage_passes=stage_passes, crowding=crowding)
    found = one_at_a_time.evaluate(choice, device)
    assert (found.prefill, found.decode) == (4, 4.25)
    found = replace(p, shares=np.full((1, 2), 0.5)).evaluate(choice, np.zeros(2, dtype=int))
    assert (found.prefill, found.decode) == (2 * (6 + 9), 2 * (6 + 9))


@pytest.mark.parametrize(
    ("shares", "crowded"),
    [
        ([0.5, 0.5], [False, False]),
        ([0.5, 1.0], [True, False]),  # what two of the second kind take is of a crowd already
        ([1.0, 1.0], [False, False]),
        ([0.5, 0.5, 0.5], [True, True, True]),
        ([0.5, 1.0, 0.5], [True, True, True]),
        ([0.75, 0.125, 0.125], [False, False, False]),  # and a thread for each processor
        ([0.5, 0.5, 0.0], [False, False, False]),
    ],
)
def test_stages_in_a_crowd(shares, crowded):
    p = replace(problem(0, 2, 1), shares=np.array([shares]))
    assert p.is_crowded(np.arange(len(shares))).tolist() == crowded


def test_one_device_has_none_of_the_passes_of_stages():
    """Two share the work where a stage has none, and where it has much one has all of it."""
    p = problem(1, 2, 3, objective="throughput")
    two = replace(p, memory=np.full(2, np.inf), stage_passes=np.zeros((2, 2, 2)))
    assert len(set(solve(two).device)) == 2
    stage_passes = np.zeros((2, 2, 2))
    stage_passes[1] = 100.0
    waiting = replace(two, stage_passes=stage_passes)
    found = solve(waiting)
    assert len(set(found.device)) == 1 and found.gap <= 2e-4
    assert found.value == pytest.approx(min(all_values(waiting)), rel=2e-4)
    # A stage has a part of what one device has: that is no reason for one device.
    parts = np.broadcast_to([10.0, 200.0], (2, 2, 2))
    parted = replace(two, passes=np.full((2, 2), 1000.0), stage_passes=parts)
    found = solve(parted)
    assert len(set(found.device)) == 2 and found.gap <= 2e-4
    assert found.value == pytest.approx(min(all_values(parted)), rel=2e-4)


@pytest.mark.parametrize(("objective", "devices"), [("bytes", 1), ("latency", 2), ("bytes", 3)])
def test_what_a_plan_comes_to_is_a_limit_that_it_keeps_to(objective, devices):
    p = problem(4, devices, 3, objective=objective)
    found = solve(replace(p, max_loss=p.loss[:, 0].sum() * 0.3))
    again = solve(replace(p, max_loss=found.costs.loss, memory=np.maximum(found.costs.held, 1.0)))
    assert again.value == pytest.approx(found.value, rel=2e-4) and again.gap <= 2e-4


def test_what_is_held_stays():
    base = problem(0, 1, 4)
    allowed = np.ones(base.loss.shape, dtype=bool)
    allowed[2] = False, True
    p = problem(0, 1, 4, allowed=allowed, max_bits=2.5)
    found = solve(p)
    assert found.choice[2] == 1
    assert found.value == pytest.approx(min(all_values(p)), rel=2e-4)


def test_many_linears_against_dynamic_programming():
    """Bits of 60 linears of whole sizes: the knapsack by its recursion over bytes."""
    p = problem(5, 1, 30, 3, max_bits=3.0)
    sizes = (p.weights[:, None] * p.bits).astype(int)
    budget = int(p.weights.sum() * 3.0)
    best = np.full(budget + 1, math.inf)
    best[0] = 0.0
    for loss, size in zip(p.loss, sizes, strict=True):
        new = np.full(budget + 1, math.inf)
        for one, count in zip(loss, size, strict=True):
            new[count:] = np.minimum(new[count:], best[: budget + 1 - count] + one)
        best = new
    assert solve(p).value == pytest.approx(best.min(), rel=2e-4)


def test_a_large_program_is_searched_and_says_how_good_it_is(monkeypatch):
    p = problem(3, 3, 3, objective="latency", max_loss=1.0)
    best = solve(p).value
    monkeypatch.setattr(solver, "SMALL", 0)
    found = solve(p, 20.0)
    assert best * (1 - 1e-3) <= found.value <= best * 1.05
    assert found.value * (1 - found.gap) <= best * (1 + 1e-3)


def test_a_search_whose_cuts_hold_nothing_begins_at_those_that_do(monkeypatch):
    p = problem(34, 2, 3, objective="bytes")
    p = replace(p, max_loss=p.loss[:, 0].sum() * 0.3)
    best = min(all_values(p))
    monkeypatch.setattr(solver, "SMALL", 0)
    found = solve(p, 20.0)
    assert found.value == pytest.approx(best) and found.gap < 0.1


@pytest.mark.covering(1)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("devices", "layers"), [(1, 4), (2, 3), (3, 2)])
def test_without_time_there_is_a_choice_that_fits(objective, devices, layers, monkeypatch):
    """The whole of its devices' memory is taken by fewer than all bits, and the loss is limited."""
    p = problem(1, devices, layers, objective=objective)
    limits = {"max_loss": p.loss[:, 0].sum() * 0.3} if objective != "loss" else {"max_bits": 3.1}
    p = replace(p, **limits)
    best = min(all_values(p))
    for small in (solver.SMALL, 0):
        monkeypatch.setattr(solver, "SMALL", small)
        found = solve(p, 0.0)
        assert found.gap == 1  # nothing is known of what there is besides
        assert (found.costs.held <= p.memory).all() and p.keeps_to_limits(found.costs)
        assert found.value <= 1.1 * best


def test_without_time_what_is_held_stays_and_a_tied_embedding_is_counted():
    base = problem(0, 3, 2, objective="loss", tied=0)
    half_of = base.half_of.copy()
    half_of[0] = base.halves - 1
    allowed = np.ones(base.loss.shape, dtype=bool)
    allowed[2] = False, True
    memory = np.full(3, 0.45 * (base.nbytes[:, 1].sum() + base.fixed_bytes.sum()))
    p = replace(base, half_of=half_of, allowed=allowed, memory=memory)
    found = solve(p, 0.0)
    assert found.choice[2] == 1 and (found.costs.held <= memory).all()
    assert found.costs.copied and found.value <= 1.5 * min(all_values(p))


def test_orders_do_not_tell_alike_devices_apart():
    assert orders(["a", "a", "a"]) == [(0, 1, 2)]
    assert len(orders(["a", "b", "a"])) == 3
    assert len(orders(list("aaaabbbb"))) == 2
    assert len({tuple("abcd"[i] for i in o) for o in orders(list("abcd"))}) == 6


def test_what_cannot_be_is_refused():
    for changes in ({"max_bits": 1.5}, {"max_bits": 2.0, "max_loss": 1e-9}):
        with pytest.raises(UnsolvedError, match="no plan keeps to all limits"):
            solve(problem(0, 1, 3, **changes))
    with pytest.raises(UnsolvedError, match="no plan was found in time"):
        solve(problem(0, 1, 3, max_bits=2.0, max_loss=1e-9), 0.0)
