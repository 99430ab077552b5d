"""LAMBADA against transformers, token by token; the real harness is in test_harness."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, tiny
from covering import slow_but
from oracle import bundled, our_bundled

from qllm.errors import UserError
from qllm.evaluate.lambada import continuation, lambada, requests
from qllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    "She went down to the sea and the sea was gone, so that nobody could see the sea",
    "Once upon a time there was a man who was not a man",
    "He said that it would be a great deal of trouble, and it was a great deal of trouble",
    "The end, as she had said, was the end",
    'He looked at her and said, "I do not know who you are.',
    "word",
    " leading",
    "ends in two  spaces",
    "the town of Ünïcöde",
]
LONG = " ".join(["and the sea was wide"] * 200)


def tokenizer(family: str) -> Tokenizer:
    return Tokenizer.load(tiny(family))


@torch.no_grad()
def expected(family: str, rows: list[str]) -> tuple[float, float]:
    """Accuracy and perplexity, each row alone."""
    coder, hits, logs = tokenizer(family), [], []
    for row in rows:
        words = row.split(" ")
        context, word = " ".join(words[:-1]), " " + words[-1]
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, word = context[:-spaces], context[-spaces:] + word
        before = coder.encode(context) or [coder.prefix_token_id]
        whole = coder.encode(context + word) if context else before + coder.encode(word)
        targets = torch.tensor(whole[len(before) :])
        whole = whole[-(512 + 1) :]
        logits = bundled(family)(torch.tensor([whole[:-1]])).logits[0][-len(targets) :].double()
        logs.append(logits.log_softmax(-1).gather(1, targets[:, None]).sum().item())
        hits.append(torch.equal(logits.argmax(-1), targets))
    return sum(hits) / len(rows), math.exp(-math.fsum(logs) / len(rows))


@pytest.mark.parametrize(("family",), slow_but([("llama",)], FAMILIES))
def test_equals_transformers_whatever_the_batch(family):
    """Some rows end as the model would end them, so that some are right."""
    model, coder = our_bundled(family), tokenizer(family)
    words = ROWS[0].split(" ")
    rows = ROWS + [guessed(family, " ".join(words[:n])) for n in range(3, len(words))]
    accuracy, perplexity = expected(family, rows)
    assert 0.3 < accuracy < 1
    found = [
        lambada(model, requests(rows, coder, model.config), batch=batch) for batch in (1, 2, 8)
    ]
    assert found[0] == found[1] == found[2]
    assert found[0]["rows"] == len(rows)
    assert found[0]["accuracy"] == accuracy
    assert found[0]["perplexity"] == pytest.approx(perplexity, rel=1e-5)


@torch.no_grad()
def guessed(family: str, row: str) -> str:
    """A row whose last word is transformers' first guess, where that begins a word."""
    coder = tokenizer(family)
    logits = bundled(family)(torch.tensor([coder.encode(row)])).logits[0, -1]
    return row + coder.decode([logits.argmax().item()])


def test_a_row_longer_than_the_window_loses_its_beginning():
    model, coder = our_bundled("llama"), tokenizer("llama")
    (request,) = requests([LONG], coder, model.config)
    assert len(request.tokens) == 512
    assert coder.encode(LONG)[-513:] == [*request.tokens, request.targets[-1]]
    accuracy, perplexity = expected("llama", [LONG])
    found = lambada(model, [request])
    assert found["accuracy"] == accuracy
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_spaces_in_front_of_a_word_are_its_own():
    coder = tokenizer("opt")
    request = continuation(coder, "two  ", "words", None)
    assert coder.decode([*request.tokens, request.targets[-1]]) == "two  words"
    assert coder.decode(list(request.tokens[: request.start + 1])) == "two"


@pytest.mark.parametrize(
    ("context", "text", "longest", "message"),
    [
        ("some", "", 512, "this has nothing to predict"),
        ("", "", 512, "this has nothing to predict"),
        ("some", " words" * 9, 4, "this has 9 tokens to predict; the model's window is 4"),
    ],
)
def test_rows_that_cannot_be_scored(context, text, longest, message):
    with pytest.raises(UserError, match=message):
        continuation(tokenizer("opt"), context, text, longest, "this")
