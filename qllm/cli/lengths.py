"""Defaults: numbers that nobody gave give way to what the model takes, and mean nothing alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qllm import bitwidths
from qllm.errors import UserError

if TYPE_CHECKING:
    from qllm.config import ModelConfig, QuantPlan


NO_LIMIT = 1 << 30  # tokens of a prompt, where a model has no window


class Default(int):
    """An option's default; what a user gives is a plain number, and never changed."""


class DefaultName(str):
    """The same of an option that takes a name."""

    __slots__ = ()


def is_given(value: object) -> bool:
    """Whether an option's value is a user's: none that stands for nothing, "auto" or a default."""
    absent = value is None or value is False or value in ([], "auto")
    return not (absent or isinstance(value, Default | DefaultName))


def up_to(value: int, maximum: int | None) -> int:
    """A number, and where it is a `Default` up to `maximum` (None: no limit), but 1 or more."""
    if maximum is None or not isinstance(value, Default):
        return value
    return Default(max(1, min(value, maximum)))


def fit_defaults(args: argparse.Namespace, config: ModelConfig, own: bool) -> None:
    """Let --max-prompt-length, --max-gen-tokens and --num-shards fit a model, where not given.

    New tokens get no more than half of its window, or what a given length of the prompt leaves.

    Args:
        own: the prompts are a user's, who gets all that the window holds of them.

    Raises:
        UserError: as many new tokens as were asked for leave no place for a prompt.
    """
    if "num_shards" in args:
        args.num_shards = up_to(args.num_shards, config.num_layers)
    if own and isinstance(args.max_prompt_length, Default):
        args.max_prompt_length = Default(NO_LIMIT)
    window = config.max_positions
    if window is not None:
        if args.max_gen_tokens >= window and not isinstance(args.max_gen_tokens, Default):
            raise UserError(
                f"a prompt and {args.max_gen_tokens} new tokens exceed the model's window of "
                f"{window}; lower --max-gen-tokens"
            )
        given = not isinstance(args.max_prompt_length, Default)
        left = window - args.max_prompt_length if given else window // 2
        args.max_gen_tokens = up_to(args.max_gen_tokens, left)
        args.max_prompt_length = up_to(args.max_prompt_length, window - args.max_gen_tokens)


def check_rounding(args: argparse.Namespace, plans: Sequence[QuantPlan]) -> None:
    """Refuse --group-size and --scheme where no plan has layers that follow them.

    Raises:
        UserError: naming the first that was given.
    """
    group_size, scheme = (v if is_given(v) else None for v in (args.group_size, args.scheme))
    bitwidths.check_rounding(plans, group_size, scheme)
