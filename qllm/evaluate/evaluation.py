"""Everything that is asked of a model, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from qllm.evaluate.agreement import ReferenceOutputs, agreement
from qllm.evaluate.lambada import lambada
from qllm.evaluate.perplexity import PerplexityOptions, Text, cut, estimate
from qllm.evaluate.scoring import Predictor, ScoringRequest
from qllm.models import Decoder

Progress = Callable[[str], Callable[[list], Iterable]]


def no_progress(what: str) -> Callable[[list], Iterable]:
    """Tells nobody."""
    return iter


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a model.

    Attributes:
        text: whose perplexity is measured; None for none.
        tasks: the requests of each, by name.
        reference: what agreement is measured with; None where it is not.
    """

    text: Text | None = None
    options: PerplexityOptions = field(default_factory=PerplexityOptions)
    tasks: dict[str, list[ScoringRequest]] = field(default_factory=dict)
    reference: ReferenceOutputs | None = None


def evaluate(
    model: Predictor, asked: Evaluation, progress: Progress = no_progress
) -> dict[str, Any]:
    """What a model answers.

    Returns:
        `perplexity` and its standard error, `perplexity_error`, by convention; `tasks` by name;
        `agreement`, None where there is no reference; `tokens_per_second` of the passes over the
        text, None without one.

    Raises:
        UserError: for a text or window that the model cannot take.
    """
    found: dict[str, Any] = {
        "perplexity": {},
        "perplexity_error": {},
        "tasks": {},
        "agreement": None,
        "tokens_per_second": None,
    }
    if asked.text is not None:
        cuts = cut(asked.text, model.config, asked.options)
        read = sum(w.end - w.begin for part in cuts for w in part.windows.windows)
        start = time.perf_counter()
        each = estimate(model, asked.text, asked.options, progress("perplexity"))
        found["perplexity"] = {name: figure.value for name, figure in each.items()}
        found["perplexity_error"] = {name: figure.error for name, figure in each.items()}
        found["tokens_per_second"] = read / (time.perf_counter() - start)
    for name, requests in asked.tasks.items():
        found["tasks"][name] = lambada(model, requests, asked.options.batch, progress(name))
    if asked.reference is not None and isinstance(model, Decoder):
        found["agreement"] = agreement(model, asked.reference, progress("agreement"))
    return found
