"""One answer whatever the batch, the padding, the number of threads and the number of shards."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from conftest import FAMILIES, ROOT, tiny
from cpu_paths import bits_of, on, paths, same
from oracle import load
from torch import Tensor

from qllm.config import LM_HEAD, QuantPlan, QuantSpec
from qllm.generate import GenerationConfig, generate
from qllm.models import Decoder
from qllm.ops.cpu import library as native
from qllm.tokenizer import Tokenizer

PROMPTS, LONGEST, NEW_TOKENS = 200, 60, 12
# Bits of the layers and of the head.
PLANS = {"3": "16", "4": "16", "8": "16", "8:tc-li": "16", "4 with a head of 8": "8"}

pytestmark = pytest.mark.usefixtures("one_thread", "kernels")


@pytest.fixture
def kernels():
    """Skips where there are none: the sums of plain torch ops depend on their shapes."""
    paths()


@functools.cache
def prompts(family: str) -> list[list[int]]:
    """Pieces of a text, of lengths that are mixed."""
    tokens = Tokenizer.load(tiny(family)).encode((ROOT / "README.md").read_text(encoding="utf-8"))
    pick = random.Random(0)
    starts = [pick.randrange(len(tokens) - LONGEST) for _ in range(PROMPTS)]
    return [tokens[start : start + 1 + 37 * i % LONGEST] for i, start in enumerate(starts)]


@functools.cache
def model_of(
    family: str, plan: str, shards: int = 1, dtype: torch.dtype = torch.float32
) -> Decoder:
    layers = QuantPlan.uniform(QuantSpec.parse(plan.split()[0]))
    head = QuantSpec.parse(PLANS[plan])
    rules = layers if head == QuantSpec() else layers.with_rule(LM_HEAD, head)
    return load(tiny(family), plan=rules, num_shards=shards, dtype=dtype)


@dataclass(frozen=True)
class Answer:
    """Of each prompt: new tokens (N, T) and the logits (N, T, V) that they were chosen by."""

    tokens: Tensor
    logits: Tensor

    def at(self, rows: Sequence[int]) -> Answer:
        return Answer(self.tokens[rows], self.logits[rows])

    def __eq__(self, other: object) -> bool:
        pair = isinstance(other, Answer) and torch.equal(self.tokens, other.tokens)
        return pair and same(self.logits, other.logits)


def answer(model: Decoder, family: str, rows: Sequence[int], batch: int, threads: int) -> Answer:
    """Some prompts' answers, found `batch` of them at a time."""
    torch.set_num_threads(threads)
    logits = []
    for start in range(0, len(rows), batch):
        some = [prompts(family)[row] for row in rows[start : start + batch]]
        cache = model.new_cache(len(some), max(map(len, some)) + NEW_TOKENS)
        steps = [model.prefill(some, cache)]
        while len(steps) < NEW_TOKENS:
            steps.append(model.decode(steps[-1].argmax(-1), cache))
        logits.append(torch.stack(steps, dim=1))
    torch.set_num_threads(1)
    logits = torch.cat(logits)
    return Answer(logits.argmax(-1), logits)


EVERY = [*range(PROMPTS)]
SHUFFLED = random.Random(1).sample(EVERY, PROMPTS)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_answer(family, plan):
    model, sharded = model_of(family, plan), model_of(family, plan, 3)
    assert len(sharded.shards) == 3
    whole = answer(model, family, EVERY, batch=PROMPTS, threads=1)
    assert len({tuple(row) for row in whole.tokens.tolist()}) > PROMPTS / 2
    cases = (
        (sharded, SHUFFLED, 64, 2),
        (model, SHUFFLED[:70], 7, 4),
        (sharded, SHUFFLED[:20], 1, 1),
        (model, SHUFFLED[:10], 1, 2),
        (model, EVERY[:40], 33, 3),
    )
    for decoder, rows, batch, threads in cases:
        got = answer(decoder, family, rows, batch, threads)
        assert got == whole.at(rows), f"batches of {batch}, {threads} threads"
    some = [prompts(family)[row] for row in SHUFFLED[:30]]
    found = generate(sharded, some, GenerationConfig(max_new_tokens=NEW_TOKENS))
    assert found == whole.tokens[SHUFFLED[:30]].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_answer_in_half_types(family, dtype):
    model, sharded = model_of(family, "4", 1, dtype), model_of(family, "4", 3, dtype)
    whole = answer(model, family, EVERY[:60], batch=60, threads=1)
    for decoder, rows, batch, threads in ((sharded, EVERY[:60], 7, 2), (model, EVERY[:9], 1, 1)):
        assert answer(decoder, family, rows, batch, threads) == whole.at(rows)


@pytest.mark.parametrize("path", native.PATHS)
@pytest.mark.parametrize("plan", ["4", "8:tc-li"])
def test_one_answer_on_every_path(plan, path):
    model, sharded = model_of("llama", plan), model_of("llama", plan, 3)
    with on(path):
        whole = answer(model, "llama", EVERY[:50], batch=50, threads=1)
        for rows, batch, threads in ((EVERY[:50], 7, 2), (EVERY[:5], 1, 1)):
            assert answer(sharded, "llama", rows, batch, threads) == whole.at(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_on_every_path(family):
    """Of a model whose activations are not rounded to 8 bits, where the last bit may show."""
    model = model_of(family, "4")
    best = answer(model, family, EVERY, batch=50, threads=1)
    for path in paths():
        with on(path):
            got = answer(model, family, EVERY, batch=50, threads=1)
        print(path, (got.tokens != best.tokens).any(1).sum(), (got.logits - best.logits).abs().max(), torch.equal(bits_of(got.logits), bits_of(best.logits)))
