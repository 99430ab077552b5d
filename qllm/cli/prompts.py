"""Options of prompts, and where they come from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qllm.cli.console import note, whole_number
from qllm.errors import UserError

if TYPE_CHECKING:
    from qllm.tokenizer import Tokenizer

DEFAULT_PROMPTS = ("He is working on", "He has a", "Everyone is happy and I can")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """--prompt, --prompt-file, --stdin, --max-prompt-length, --max-gen-tokens."""
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="may be given repeatedly")
    group.add_argument("--prompt-file", metavar="FILE", help="one prompt per line")
    group.add_argument("--stdin", action="store_true", help="prompts from standard input, likewise")
    group.add_argument(
        "--max-prompt-length",
        type=whole_number(1),
        default=20,
        metavar="N",
        help="a prompt of more tokens loses its beginning (%(default)s)",
    )
    group.add_argument(
        "--max-gen-tokens",
        type=whole_number(1),
        default=10,
        metavar="N",
        help="tokens to generate (%(default)s)",
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the options give, or the default ones."""
    prompts = list(args.prompt or ())
    try:
        if args.prompt_file:
            prompts += _lines(Path(args.prompt_file).read_bytes())
        if args.stdin:
            prompts += _lines(sys.stdin.buffer.read())
    except OSError as error:
        raise UserError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError("prompts are UTF-8 text, and what was given is not") from None
    if not prompts:
        if args.prompt_file or args.stdin:
            raise UserError("there is no prompt: no line of what was given has text")
        return list(DEFAULT_PROMPTS)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty; give it some text")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"prompt {number} is not UTF-8 text")
    return prompts


def _lines(data: bytes) -> list[str]:
    lines = data.decode("utf-8").split("\n")
    return [line.rstrip("\r") for line in lines if line.strip()]


def tokenize(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    limit: int,
    note: Callable[[str], None] = note,
) -> list[list[int]]:
    """Token ids of prompts; one of more than `limit` tokens loses its beginning, with a note."""
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        ids = tokenizer.encode(prompt)
        if len(ids) > limit:
            note(
                f"prompt {number} has {len(ids)} tokens and loses its beginning; "
                f"--max-prompt-length is {limit}"
            )
            ids = tokenizer.encode(prompt, limit)
        encoded.append(ids)
    return encoded
