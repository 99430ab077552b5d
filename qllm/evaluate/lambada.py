"""LAMBADA (Paperno et al. 2016): the last word of a passage, which takes all of it to guess.

As lm-evaluation-harness's `lambada_openai` has it: the last word is what follows the last space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.evaluate.perplexity import exp
from qllm.evaluate.scoring import DEFAULT_BATCH, Predictor, ScoringRequest, score
from qllm.tokenizer import Tokenizer


def continuation(
    tokenizer: Tokenizer, context: str, text: str, longest: int | None, name: str = "a row"
) -> ScoringRequest:
    """The request that scores `text` behind `context`, as lm-evaluation-harness has it.

    Spaces at the context's end go to the text, the two are encoded together, and what the model's
    window cannot hold is left out in front.

    Args:
        longest: tokens that the model can read; None where nothing limits them.
        name: of the row, for errors.

    Raises:
        UserError: for a text that has no tokens of its own, or more than the window holds.
    """
    bare = context.rstrip()
    text, context = context[len(bare) :] + text, bare
    if context:
        before = tokenizer.encode_open(context)
        targets = tokenizer.encode_open(context + text)[len(before) :]
    else:
        targets = tokenizer.encode_open(text)[len(tokenizer.prefix) :]
        before = [] if tokenizer.prefix_token_id is None else [tokenizer.prefix_token_id]
    if not targets or not before:
        raise UserError(f"{name} has nothing to predict, or nothing to predict it from: {text!r}")
    if longest is not None and len(targets) > longest:
        raise UserError(
            f"{name} has {len(targets)} tokens to predict; the model's window is {longest}"
        )
    tokens = (before + targets)[:-1]
    tokens = tokens if longest is None else tokens[-longest:]
    return ScoringRequest(tokens, len(tokens) - len(targets), targets)


def requests(
    rows: Sequence[str], tokenizer: Tokenizer, config: ModelConfig
) -> list[ScoringRequest]:
    """Each row's last word behind what is in front of it.

    Raises:
        UserError: see `continuation`.
    """
    found = []
    for number, row in enumerate(rows, 1):
        context, _, word = row.rpartition(" ")
        where = f"row {number}"
        found.append(continuation(tokenizer, context, " " + word, config.max_positions, where))
    return found


def lambada(
    model: Predictor,
    rows: list[ScoringRequest],
    batch: int = DEFAULT_BATCH,
    progress: Callable[[list], Iterable] = iter,
) -> dict[str, float]:
    """How well a model guesses the last words of `requests`.

    Returns:
        `accuracy`, the share of words all of whose tokens were the likeliest; `perplexity`, exp of
        a word's mean negative log-likelihood; `rows`, how many there were.
    """
    found = list(score(model, progress(rows), batch, greedy=True))
    return {
        "accuracy": sum(each.greedy is True for each in found) / len(found),
        "perplexity": exp(math.fsum(each.loss for each in found) / len(found)),
        "rows": len(found),
    }
