"""How well a model predicts a text, and how far it is from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch.nn.functional import cross_entropy, kl_div

from qllm.errors import UserError
from qllm.models import Decoder


def perplexity(
    model: Decoder,
    ids: list[int],
    window: int,
    progress: Callable[[list], Iterable] = iter,
) -> float:
    """exp of the mean negative log-likelihood of each token given those before it.

    GPTQ's convention (Frantar et al. 2023): the text is cut into windows that do not overlap, a
    last, shorter one is left out, and the first token of each is not predicted.

    Args:
        ids: the text's tokens.
        window: tokens per window, 2 or more.

    Raises:
        UserError: for a window that the model cannot take, or a text shorter than one.
    """
    parts = windows(model, ids, window)
    total = 0.0
    for tokens in progress(parts):
        logits = model.prefill([tokens], last=False)
        targets = logits.new_tensor(tokens[1:]).long()
        total += cross_entropy(logits[:-1], targets, reduction="sum").item()
    return math.exp(total / (len(parts) * (window - 1)))


def divergence(
    model: Decoder,
    reference: Decoder,
    ids: list[int],
    window: int,
    progress: Callable[[list], Iterable] = iter,
) -> float:
    """Mean Kullback-Leibler divergence of a model's next-token distribution from the reference's.

    In nats, D(reference || model), over every position of the windows that `perplexity` takes. It
    sees what perplexity may hide: a model that is wrong in a new way, but not more often.

    Raises:
        UserError: for a window that the models cannot take, or a text shorter than one.
    """
    parts = windows(model, ids, window)
    total = 0.0
    for tokens in progress(parts):
        expected = reference.prefill([tokens], last=False).log_softmax(-1)
        found = model.prefill([tokens], last=False).log_softmax(-1)
        total += kl_div(found, expected, reduction="sum", log_target=True).item()
    return total / (len(parts) * window)


def windows(model: Decoder, ids: list[int], window: int) -> list[list[int]]:
    """A text's tokens in windows that do not overlap; a last, shorter one is left out.

    Raises:
        UserError: for a window that the model cannot take, or a text shorter than one.
    """
    longest = model.config.max_positions
    if window < 2 or (longest is not None and window > longest):
        raise UserError(
            f"a window of {window} tokens cannot be; give 2 or more"
            + (f", up to the model's {longest}" if longest is not None else "")
        )
    starts = range(0, len(ids) - window + 1, window)
    if not starts:
        raise UserError(f"the text has {len(ids)} tokens, fewer than one window of {window}")
    return [ids[start : start + window] for start in starts]


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first index at which two token lists differ, or one has ended; None for equal ones."""
    for index, (ours, theirs) in enumerate(zip(tokens, reference, strict=False)):
        if ours != theirs:
            return index
    shorter = min(len(tokens), len(reference))
    return None if len(tokens) == len(reference) else shorter
