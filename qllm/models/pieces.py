"""Prompts in pieces, so that a pass of prefill takes no more tokens than its activations allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

# Of a pass: prompts, and which tokens of each.
Pieces = list[tuple[int, range]]


def pieces_of(lengths: Sequence[int], limit: int) -> Iterator[Pieces]:
    """What each pass takes, of up to `limit` tokens: prompts, and which tokens of each."""
    taken: Pieces = []
    left = limit
    for i, length in enumerate(lengths):
        start = 0
        while start < length:
            piece = range(start, min(length, start + left))
            taken.append((i, piece))
            start, left = piece.stop, left - len(piece)
            if not left:
                yield taken
                taken, left = [], limit
    if taken:
        yield taken


def ends_of(pieces: Pieces, lengths: Sequence[int], rows: int) -> list[int]:
    """Which hidden states of a pass are those of prompts' last tokens.

    Args:
        lengths: of the prompts.
        rows: hidden states that there are: one for each token, or for each piece's last one.
    """
    lasts = [end - 1 for end in accumulate(len(piece) for _, piece in pieces)]
    found = range(len(pieces)) if rows == len(pieces) else lasts
    return [row for row, (i, piece) in zip(found, pieces, strict=True) if piece.stop == lengths[i]]
