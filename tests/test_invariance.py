"""One answer whatever the batch, the padding, the number of threads and the number of shards."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from conftest import FAMILIES, ROOT, tiny
from covering import each, slow_but
from cpu_paths import on, paths, same
from oracle import load
from torch import Tensor

from qllm.config import LM_HEAD, QuantPlan, QuantSpec
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import Decoder
from qllm.tokenizer import Tokenizer

PROMPTS, LONGEST, NEW_TOKENS = 130, 40, 4
# Bitwidths of the layers, of the head, and of activations.
PLANS = (
    *(("3", "16", "16"), ("4", "16", "16"), ("8", "16", "16"), ("8:tc-li", "16", "16")),
    *(("4", "8", "16"), ("4", "8", "8")),
)
FOUR, TENSOR_CORES = PLANS[1], PLANS[3]
HALVES = (torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("one_thread", "cpu_kernels")


def named(value: object) -> str:
    return "-".join(value) if isinstance(value, tuple) else str(value)


@functools.cache
def prompts(family: str) -> list[list[int]]:
    """Pieces of a text, of lengths that are mixed."""
    tokens = Tokenizer.load(tiny(family)).encode((ROOT / "README.md").read_text(encoding="utf-8"))
    pick = random.Random(0)
    starts = [pick.randrange(len(tokens) - LONGEST) for _ in range(PROMPTS)]
    return [tokens[start : start + 1 + 37 * i % LONGEST] for i, start in enumerate(starts)]


@functools.cache
def model_of(
    family: str, plan: tuple[str, str, str], shards: int = 1, dtype: torch.dtype = torch.float32
) -> Decoder:
    layers, head = map(QuantSpec.parse, plan[:2])
    rules = QuantPlan.uniform(layers)
    if head.bits < 16:
        rules = rules.with_rule(LM_HEAD, head)
    options = {"num_shards": shards, "dtype": dtype, "activation_bits": int(plan[2])}
    return load(tiny(family), plan=rules, **options)


@dataclass(frozen=True)
class Answer:
    """Of each prompt: new tokens (N, T) and the logits (N, T, V) that they were chosen by."""

    tokens: Tensor
    logits: Tensor

    def at(self, rows: Sequence[int]) -> Answer:
        return Answer(self.tokens[rows], self.logits[rows])

    def is_same(self, other: Answer) -> bool:
        """To the bit."""
        return torch.equal(self.tokens, other.tokens) and same(self.logits, other.logits)


def answer(
    model: Decoder,
    family: str,
    rows: Sequence[int],
    batch: int,
    threads: int,
    new_tokens: int = NEW_TOKENS,
) -> Answer:
    """Some prompts' answers, found `batch` of them at a time."""
    torch.set_num_threads(threads)
    logits = []
    for start in range(0, len(rows), batch):
        some = [prompts(family)[row] for row in rows[start : start + batch]]
        cache = model.new_cache(len(some), max(map(len, some)) + new_tokens)
        steps = [model.prefill(some, cache)]
        while len(steps) < new_tokens:
            steps.append(model.decode(steps[-1].argmax(-1), cache))
        logits.append(torch.stack(steps, dim=1))
    torch.set_num_threads(1)
    logits = torch.cat(logits)
    return Answer(logits.argmax(-1), logits)


EVERY = [*range(PROMPTS)]
SHUFFLED = random.Random(1).sample(EVERY, PROMPTS)


@pytest.mark.parametrize(
    ("family", "plan"), slow_but(each(FAMILIES, PLANS), FAMILIES, PLANS), ids=named
)
def test_one_answer(family, plan):
    model, sharded = model_of(family, plan), model_of(family, plan, 3)
    assert len(sharded.device_map) == 3
    whole = answer(model, family, EVERY, batch=PROMPTS, threads=1)
    assert len({tuple(row) for row in whole.tokens.tolist()}) > PROMPTS / 2
    cases = (
        (sharded, SHUFFLED[:66], 33, 2),
        (model, SHUFFLED[:35], 7, 4),
        (sharded, SHUFFLED[:8], 1, 1),
        (model, SHUFFLED[:4], 1, 2),
        (model, EVERY[:34], 17, 4),
    )
    for decoder, rows, batch, threads in cases:
        got = answer(decoder, family, rows, batch, threads)
        assert got.is_same(whole.at(rows)), f"batches of {batch}, {threads} threads"
    some = [prompts(family)[row] for row in SHUFFLED[:20]]
    found = generate(sharded, some, GenerationConfig(max_new_tokens=NEW_TOKENS))
    assert found == whole.tokens[SHUFFLED[:20]].tolist()


@pytest.mark.parametrize(
    ("family", "dtype"), slow_but(each(FAMILIES, HALVES), FAMILIES, HALVES), ids=named
)
def test_one_answer_in_half_types(family, dtype):
    model, sharded = model_of(family, FOUR, 1, dtype), model_of(family, FOUR, 3, dtype)
    whole = answer(model, family, EVERY[:60], batch=60, threads=1)
    for decoder, rows, batch, threads in ((sharded, EVERY[:60], 7, 2), (model, EVERY[:9], 1, 1)):
        assert answer(decoder, family, rows, batch, threads).is_same(whole.at(rows))


@pytest.mark.parametrize(
    ("family", "plan"),
    slow_but([("llama", FOUR)], FAMILIES, (FOUR, TENSOR_CORES)),
    ids=named,
)
def test_one_answer_on_every_path(family, plan):
    """The tokens are the same on all of them, but where activations are rounded to 8 bits.

    Norms and attention sum in as many lanes as a path has, and rounding may show a last bit.
    """
    model, sharded = model_of(family, plan), model_of(family, plan, 3)
    # Without vector instructions a token takes long.
    rows = [row for row in EVERY if len(prompts(family)[row]) < 8][:6]
    find = functools.partial(answer, family=family, new_tokens=3)
    best = find(model, rows=rows, batch=6, threads=1)
    for path in paths():
        with on(path):
            whole = find(model, rows=rows, batch=6, threads=1)
            assert find(sharded, rows=rows, batch=4, threads=2).is_same(whole)
            assert find(model, rows=rows[:3], batch=1, threads=1).is_same(whole.at([0, 1, 2]))
        assert torch.equal(whole.tokens, best.tokens) or plan == TENSOR_CORES
