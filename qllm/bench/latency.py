"""How long single tokens take, one after the other, and what their perplexity says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

from qllm.bench.runners import ModelRunner
from qllm.bench.speed import decode_one_by_one
from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.evaluate.perplexity import PerplexityOptions, Text, perplexity
from qllm.evaluate.scoring import Predictor


def random_tokens(config: ModelConfig, count: int) -> list[int]:
    """Token ids, each time the same."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (count,), generator=draw).tolist()


def check_length(config: ModelConfig, longest: int) -> None:
    """Refuse sequences that the model cannot hold.

    Raises:
        UserError: for more tokens than its window has.
    """
    window = config.max_positions
    if window is not None and longest > window:
        raise UserError(
            f"{longest} tokens are more than the model's window of {window} holds; give "
            f"`longest` {window} to begin anew after as many"
        )


def latency(
    runner: ModelRunner,
    tokens: Sequence[int],
    longest: int,
    *,
    check: bool,
    progress: Callable[[list], Iterable] = iter,
) -> dict[str, Any]:
    """What `decode_one_by_one` finds.

    Args:
        check: measure the perplexity of the tokens, too, by decode and by prefill.
    """
    found = decode_one_by_one(runner, tokens, longest, progress)
    if not check:
        del found["perplexity"]
    elif longest > 1:
        # Sequences as they were decoded: the same number, by the other way through the model.
        model = cast(Predictor, runner.model)
        options = PerplexityOptions(("strided",), longest, longest)
        by_prefill = perplexity(model, Text("", tokens), options)["strided"]
        found["perplexity_by_prefill"] = by_prefill
    return found
