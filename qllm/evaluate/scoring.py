"""Log-likelihoods of given tokens, a few requests at a time and never more logits than needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qllm.config import ModelConfig

DEFAULT_BATCH = 8
# Up to this many tokens a forward call takes several requests. Our own kernels compute each row as
# if it were alone; on GPUs the dense product of more rows is a library's, which may not.
TOGETHER = 256
HEAD_ROWS = 512  # of hidden states that the LM head takes at once
PIECE = 1 << 20  # logits that are worked on at once, so that they stay in cache


class Predictor(Protocol):
    """What is scored: a `Decoder`, or transformers' model of `qllm.huggingface`."""

    config: ModelConfig

    def hidden(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """What the layers make of whole prompts, (N, C) for all N tokens."""

    def logits(self, x: Tensor) -> Tensor:
        """Logits (M, V) of rows (M, C) of `hidden`."""


class ScoringRequest(NamedTuple):
    """Tokens that a model reads, and those that it is to predict from one of them on.

    Attributes:
        tokens: what is read.
        start: index of the first that predicts.
        targets: what it and those behind it predict, one each.
    """

    tokens: Sequence[int]
    start: int
    targets: Sequence[int]


class Score(NamedTuple):
    """How a request's targets were predicted, in float64.

    Attributes:
        loss: the sum of their negative log-likelihoods, in nats.
        greedy: whether each was the likeliest token; None where nobody asked.
    """

    loss: float
    greedy: bool | None


@torch.inference_mode()
def score(
    model: Predictor,
    requests: Iterable[ScoringRequest],
    batch: int = DEFAULT_BATCH,
    *,
    greedy: bool = False,
) -> Iterator[Score]:
    """Score requests, in their order.

    Args:
        batch: how many may share a forward call. On a CPU with our kernels it does not change a
            bit of any score.
        greedy: find out whether the targets were the likeliest tokens, too.
    """
    for group in groups(requests, batch):
        targets = [target for request in group for target in request.targets]
        losses, hits = [], []
        for rows, logits in scored_logits(model, group):
            wanted = torch.tensor(targets[rows], device=logits.device)
            losses.append(cross_entropy(logits, wanted, reduction="none").double())
            if greedy:
                hits.append(logits.argmax(-1) == wanted)
        counts = [len(request.targets) for request in group]
        all_losses = torch.cat(losses).split(counts)
        all_hits = torch.cat(hits).split(counts) if greedy else [None] * len(group)
        for loss, hit in zip(all_losses, all_hits, strict=True):
            yield Score(loss.sum().item(), None if hit is None else bool(hit.all()))


def groups(requests: Iterable[ScoringRequest], batch: int) -> Iterator[list[ScoringRequest]]:
    """Passages as forward calls take them: up to `batch` of them, and TOGETHER tokens or one."""
    group: list[ScoringRequest] = []
    size = 0
    for request in requests:
        length = len(request.tokens)
        if group and (len(group) == batch or size + length > TOGETHER):
            yield group
            group, size = [], 0
        group.append(request)
        size += length
    if group:
        yield group


def scored_logits(
    model: Predictor, group: Sequence[ScoringRequest]
) -> Iterator[tuple[slice, Tensor]]:
    """The logits that predict the targets of requests, one after the other, in pieces.

    Yields:
        which of the targets a piece predicts, and float32 logits (M, V).
    """
    done = 0
    for piece in logit_pieces(model.logits, hidden_rows(model, group), model.config.vocab_size):
        yield slice(done, done + len(piece)), piece
        done += len(piece)


def logit_pieces(head: Callable[[Tensor], Tensor], x: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """The float32 logits (M, V) of hidden states (N, C), some rows at a time."""
    step = max(1, PIECE // vocab_size)
    for part in x.tensor_split(-(-len(x) // HEAD_ROWS)):
        for piece in head(part).split(step):
            yield piece.float()


def hidden_rows(model: Predictor, group: Sequence[ScoringRequest]) -> Tensor:
    """The hidden states (M, C) that predict the targets of requests."""
    x = model.hidden([request.tokens for request in group])
    parts = x.split([len(request.tokens) for request in group])
    rows = [
        part[request.start : request.start + len(request.targets)]
        for part, request in zip(parts, group, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
