"""Parts of a batch beside each other: who takes which, with how many threads, and what they add."""

from __future__ import annotations

import threading

import pytest
import torch

from qllm.quantizer import workers as workers_module
from qllm.quantizer.workers import SharedSum, Workers

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3, 9])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_items_come_back_in_their_order_and_threads_are_divided(threads):
    seen = []

    def square(item: int) -> int:
        torch.ones(1 << 16).sum()  # whose first call in a thread sets that thread's number of them
        seen.append((item, threading.get_ident(), torch.get_num_threads()))
        return item**2

    with Workers(CPU) as workers:
        assert workers.count == min(threads, workers_module.MOST)
        for _ in range(2):
            assert workers.map(square, range(7)) == [item**2 for item in range(7)]
        assert torch.get_num_threads() == threads
    for number in range(workers.count):
        # One thread each, the same in both rounds.
        assert len({who for item, who, _ in seen if item % workers.count == number}) == 1
    assert {own for *_, own in seen} == {threads // workers.count}


def test_a_sum_is_the_same_to_the_bit_every_time(threads):
    draw = torch.Generator().manual_seed(0)
    parts = torch.randn(13, 50, generator=draw) * 10 ** torch.randn(13, 1, generator=draw)
    with Workers(CPU) as workers:
        found = []
        for _ in range(5):
            total = SharedSum(parts[0], workers)
            workers.map(total.add, parts)
            found.append(total.take().sum(0))
    assert all(torch.equal(each, found[0]) for each in found)
    torch.testing.assert_close(found[0], parts.sum(0), rtol=1e-4, atol=1e-4)


def test_a_sum_of_products_begins_anew_each_time(threads, monkeypatch):
    monkeypatch.setattr(workers_module, "COLUMNS_AT_ONCE", 3)
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, 6, generator=draw), torch.randn(5, 6, 8, generator=draw)
    with Workers(CPU) as workers:
        total = SharedSum(torch.empty(4, 8), workers)
        for items in (range(5), range(3), range(1)):
            workers.map(lambda i: total.add_product(a[i], b[i]), items)
            parts = total.take()
            assert len(parts) == min(len(items), workers.count)
            expected = sum(a[i].double() @ b[i].double() for i in items)
            torch.testing.assert_close(parts.double().sum(0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(8, 9, 4), (8, 3, 3), (1, 9, 1), (5, 0, 1)]
)
def test_samples_are_divided_among_all(count, most, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Workers(CPU) as workers:
            assert workers.parts(count, most) == expected
    finally:
        torch.set_num_threads(before)


def test_an_error_of_one_is_raised(threads):
    def fail(item: int) -> None:
        if item == 2:
            raise MemoryError("of item 2")

    with Workers(CPU) as workers, pytest.raises(MemoryError, match="of item 2"):
        workers.map(fail, range(4))


def test_on_a_gpu_there_is_none_but_who_asks():
    with Workers(torch.device("cuda")) as workers:
        assert workers.count == 1
        assert workers.map(lambda _: threading.get_ident(), [0]) == [threading.get_ident()]
