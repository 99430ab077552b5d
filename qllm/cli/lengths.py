"""Numbers that nobody gave, which give way to what the model takes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qllm.config import ModelConfig


NO_LIMIT = 1 << 30  # tokens of a prompt, where a model has no window


class Default(int):
    """An option's default; what a user gives is a plain number, and never changed."""


def up_to(value: int, most: int | None) -> int:
    """A number, and where it is a `Default` no more than `most` (None: no limit), but 1 or more."""
    if most is None or not isinstance(value, Default):
        return value
    return Default(max(1, min(value, most)))


def fit_defaults(args: argparse.Namespace, config: ModelConfig, own: bool) -> None:
    """Let --max-prompt-length, --max-gen-tokens and --num-shards fit a model, where not given.

    New tokens get no more than half of its window, or what a given length of the prompt leaves.

    Args:
        own: the prompts are a user's, who gets all that the window holds of them.
    """
    if "num_shards" in args:
        args.num_shards = up_to(args.num_shards, config.num_layers)
    if own and isinstance(args.max_prompt_length, Default):
        args.max_prompt_length = Default(NO_LIMIT)
    window = config.max_positions
    if window is not None:
        given = not isinstance(args.max_prompt_length, Default)
        left = window - args.max_prompt_length if given else window // 2
        args.max_gen_tokens = up_to(args.max_gen_tokens, left)
        args.max_prompt_length = up_to(args.max_prompt_length, window - args.max_gen_tokens)
