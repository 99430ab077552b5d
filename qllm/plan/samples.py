"""The windows of a text that losses are measured on."""

from __future__ import annotations

from pathlib import Path

from qllm.checkpoint.reader import read_raw_config
from qllm.data import load_text, sample_windows
from qllm.errors import UserError
from qllm.models import read_config
from qllm.tokenizer import Tokenizer

# Of each, where nobody says how long they are; and those that divergence is measured on.
TOKENS, MAX_JUDGED_TOKENS = 2048, 8192


def draw_samples(
    folder: Path, dataset: str, count: int, length: int | None, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of a text that Hessians are made of, and others to measure divergence on.

    Args:
        folder: the model's.
        dataset: see `qllm.data.load_text`.
        count: of the former; there are at most a quarter as many of the latter.
        length: tokens of each; None: TOKENS, or as many as the model takes.

    Raises:
        UserError: for a longer window than the model takes, or a text that is too short.
    """
    config = read_config(read_raw_config(folder))
    window = config.max_positions or TOKENS
    length = length or min(TOKENS, window)
    if length > window:
        raise UserError(f"`length` {length} exceeds the model's window of {window}")
    ids = Tokenizer.load(folder, config.vocab_size).encode(load_text(dataset))
    more = max(1, min(MAX_JUDGED_TOKENS // length, count // 4))
    windows = sample_windows(ids, count + more, length, seed)
    return windows[:count], windows[count:]
