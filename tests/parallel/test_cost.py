"""The cost model: bytes are those that ranks send, times by hand."""

from __future__ import annotations

import pytest
from conftest import tiny
from cpu_paths import paths
from oracle import load
from ranks import on_ranks

from qllm.parallel.cost import Machine, Network, cost, exchange_seconds, table
from qllm.parallel.group import Group
from qllm.parallel.pipeline import ParallelContext

MACHINE = Machine(bandwidth=1e9, overhead=1e-5)


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(("family", "world"), [("opt", 2), ("bloom", 4), ("llama", 2)])
def test_bytes_and_exchanges_are_what_ranks_send(family, world, mode, one_thread, shallow_of):
    paths()
    folder = shallow_of(family)

    def run(rank, links):
        import torch

        parallel = ParallelContext(Group(range(world), rank, links), mode)
        model = load(folder, "4", dtype=torch.float16, parallel=parallel)
        cache = model.new_cache(3, 9)
        model.prefill([[5, 6], [7], [8]], cache)
        before = links.sent, links.calls
        model.decode(torch.tensor([1, 2, 3]), cache)
        model.decode(torch.tensor([1, 2, 3]), cache)
        return (links.sent - before[0]) / 2, (links.calls - before[1]) / 2, model.config

    results = on_ranks(world, run)
    config = results[0][2]
    guess = cost(config, 10**6, MACHINE, Network(25e9), tp=world, mode=mode, rows=3)
    assert {(calls) for _, calls, _ in results} == {guess.exchanges}
    # Shares are as even as whole units let them be.
    assert sum(sent for sent, _, _ in results) / world == pytest.approx(guess.bytes, rel=1e-3)


def test_seconds_by_hand():
    network = Network(bandwidth=8e9, latency=1e-5, per_message=1e-6)
    assert exchange_seconds(1000, 5, network) == pytest.approx(1e-5 + 4e-6 + 4e-6)
    config = load(tiny("opt")).config
    one = cost(config, 10**6, MACHINE, network)
    assert (one.seconds, one.bytes, one.exchanges) == (pytest.approx(1e-3 + 6e-5), 0, 0)
    two = cost(config, 10**6, MACHINE, network, tp=2, mode="fast")
    assert two.exchanges == 2 * 6 + 2 and two.compute == pytest.approx(5e-4 + 6e-5)
    assert two.bytes == 12 * 512 + 512 + 4096
    staged = cost(config, 10**6, MACHINE, network, pp=3)
    assert staged.compute == one.compute and staged.communication > 0


def test_a_table_has_the_networks_that_were_asked_for():
    config = load(tiny("opt")).config
    one, *rows = table(config, 10**6, MACHINE)
    assert (one["ranks"], one["gbit"], one["mode"], one["communication"]) == (1, None, None, 0)
    assert [(r["ranks"], r["gbit"], r["mode"]) for r in rows] == [
        (8, 25, "fast"),
        (8, 25, "exact"),
        (8, 400, "fast"),
        (8, 400, "exact"),
    ]
    assert all(row["ms"] > row["communication"] > 0 for row in rows)
