"""Prompts in pieces, so that a pass of prefill takes no more tokens than its activations allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def pieces_of(lengths: Sequence[int], limit: int) -> Iterator[list[tuple[int, range]]]:
    """What each pass takes, of up to `limit` tokens: prompts, and which tokens of each."""
    taken: list[tuple[int, range]] = []
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
