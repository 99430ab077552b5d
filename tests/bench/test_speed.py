"""What is timed, how often and on what; perplexity of decoded tokens against transformers."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES
from oracle import bundled, draw_prompts, our_bundled, prefill_logits

from qllm.bench import speed
from qllm.bench.runners import ModelRunner, ReferenceRunner
from qllm.bench.speed import Case, cases, decode_one_by_one, measure, seconds_of
from qllm.errors import UserError
from qllm.evaluate.perplexity import PerplexityOptions, Text, perplexity
from qllm.huggingface import HuggingFaceModel

pytestmark = pytest.mark.usefixtures("one_thread")


def theirs(family: str) -> ReferenceRunner:
    model = our_bundled(family)
    return ReferenceRunner(
        HuggingFaceModel(bundled(family), model.config), ModelRunner.of_decoder(model)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_both_runners_compute_the_same(family):
    prompts = draw_prompts([7, 7, 7], 4096)
    ours = ModelRunner.of_decoder(our_bundled(family))
    for runner in (ours, theirs(family)):
        runner.begin(3, 12)
        logits = [runner.prefill(prompts)]
        for token in (5, 6, 7):
            logits.append(runner.step(torch.tensor([token] * 3)))
        if runner is ours:
            expected = logits
    for found, want in zip(logits, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("family", "tied"), [("opt", True), ("bloom", True), ("llama", False)])
def test_bytes_that_a_step_reads(family, tied):
    for runner in (ModelRunner.of_decoder(our_bundled(family)), theirs(family)):
        unread = 0 if tied else 4096 * 256 * 4
        assert runner.nbytes - runner.read_bytes(1) == unread
    count = 6 * (4 * 256**2 + 2 * 256 * 1024)
    if family == "llama":
        count = 6 * (256 * 512 + 256**2 + 3 * 256 * 704)
    assert ModelRunner.of_decoder(our_bundled(family)).multiplied == count


class Spy:
    """Counts what it is asked to run."""

    nbytes, multiplied = 1000, 500

    def read_bytes(self, rows: int) -> int:
        return 800

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def begin(self, rows: int, capacity: int) -> None:
        self.calls.append(("begin", rows, capacity))

    def prefill(self, prompts):
        self.calls.append(("prefill", len(prompts), len(prompts[0])))
        return torch.zeros(len(prompts), 9)

    def step(self, tokens):
        self.calls.append(("step", len(tokens)))
        return torch.zeros(len(tokens), 9)


def test_what_a_prompt_and_new_tokens_run():
    spy = Spy()
    seconds_of(spy, Case("pp", 5, 3), 9)
    assert spy.calls == [("begin", 3, 5), ("prefill", 3, 5)]
    spy.calls.clear()
    seconds_of(spy, Case("tg", 4, 2), 9)
    assert spy.calls == [("begin", 2, 7), ("prefill", 2, 1), *[("step", 2)] * 6]


def test_runs_are_in_turn_and_the_first_is_not_counted(monkeypatch):
    order = []
    seconds = itertools.chain([9.0, 9.0], itertools.cycle([1.0, 4.0, 3.0, 4.0]))
    monkeypatch.setattr(
        speed, "seconds_of", lambda runner, *rest: order.append(runner) or next(seconds)
    )
    roofline = iter([speed.Roofline(4e3, 1e5), speed.Roofline(6e3, 1e5)])
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: next(roofline))
    first, second = Spy(), Spy()
    config = SimpleNamespace(vocab_size=9)
    rows = measure([first, second], Case("tg", 10, 2), 2, config, "cpu")
    assert order == [first, second] * 3
    assert rows[0]["seconds"] == [1.0, 3.0]
    assert rows[0]["tokens_per_second"] == pytest.approx((20 / 1 + 20 / 3) / 2)
    assert rows[0]["deviation"] == pytest.approx((20 - 20 / 3) / math.sqrt(2))
    # 10 steps read 800 bytes each and multiply 2 x 500 weights, in a median of 2 seconds.
    assert rows[0]["gigabytes_per_second"] == pytest.approx(10 * 800 / 2 / 1e9)
    assert rows[0]["of_bandwidth"] == pytest.approx(4000 / 5e3)
    assert rows[0]["of_arithmetic"] == pytest.approx(2 * 20 * 500 / 2 / 1e5)
    assert rows[1]["deviation"] == 0
    assert (rows[0]["test"], rows[0]["batch"], rows[0]["bytes"]) == ("tg10", 2, 1000)


def test_a_prompt_reads_the_weights_once(monkeypatch):
    monkeypatch.setattr(speed, "seconds_of", lambda *rest: 0.5)
    monkeypatch.setattr(speed.Roofline, "measure", lambda device: None)
    (row,) = measure([Spy()], Case("pp", 10, 2), 1, SimpleNamespace(vocab_size=9), "cpu")
    assert row["gigabytes_per_second"] == pytest.approx(800 / 0.5 / 1e9)
    assert row["of_bandwidth"] is row["of_arithmetic"] is None


def test_cases_are_every_combination():
    config = our_bundled("opt").config
    found = [(str(case), case.batch) for case in cases(config, (0, 8), (4, 2), (1, 3))]
    assert found == [("pp8", 1), ("tg4", 1), ("tg2", 1), ("pp8", 3), ("tg4", 3), ("tg2", 3)]
    assert cases(config, (512,), (509,), (1,))
    for prompts, news in (((513,), ()), ((), (510,))):
        with pytest.raises(UserError, match="of context; the model's window is 512"):
            cases(config, prompts, news, (1,))
    assert cases(our_bundled("bloom").config, (10**6,), (), (1,))  # no limit but memory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "longest"), [(30, 30), (30, 8), (24, 8)])
def test_perplexity_of_decoded_tokens(family, count, longest):
    (tokens,) = draw_prompts([count], 4096)
    found = decode_one_by_one(ModelRunner.of_decoder(our_bundled(family)), tokens, longest)
    losses = []
    for start in range(0, count, longest):
        part = tokens[start : start + longest]
        logs = prefill_logits(bundled(family), [part]).double().log_softmax(-1)
        losses += [-logs[i, token].item() for i, token in enumerate(part[1:])]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    by_prefill = perplexity(
        our_bundled(family), Text("", tokens), PerplexityOptions(("strided",), longest, longest)
    )
    assert found["perplexity"] == pytest.approx(by_prefill["strided"], rel=1e-4)
    assert found["tokens"] == len(found["seconds"]) == count
    assert found["sequences"] == -(-count // longest)
    assert min(found["seconds"]) <= found["median"] <= found["p90"] <= found["p99"]


def test_single_tokens_predict_nothing():
    found = decode_one_by_one(ModelRunner.of_decoder(our_bundled("opt")), [5, 6], 1)
    assert found["perplexity"] is None
