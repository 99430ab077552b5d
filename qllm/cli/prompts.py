"""Options of prompts, and where they come from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qllm.cli.console import note, whole_number
from qllm.cli.lengths import Default
from qllm.config import MAX_SEED
from qllm.data import JSON_LINES, json_rows
from qllm.errors import UserError
from qllm.progress import Note
from qllm.text import MAX_BYTES, decode, read_text, surrogate

if TYPE_CHECKING:
    from qllm.tokenizer import Tokenizer

DEFAULT_PROMPTS = ("He is working on", "He has a", "Everyone is happy and I can")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """--prompt, --prompt-file, --stdin, --max-prompt-length, --max-gen-tokens."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text to continue; may be given repeatedly (three examples)",
    )
    group.add_argument(
        "--prompt-file", metavar="FILE", help='one prompt per line, in .jsonl as {"prompt": "…"}'
    )
    group.add_argument(
        "--stdin", action="store_true", help="prompts from standard input, one per line"
    )
    group.add_argument(
        "--max-prompt-length",
        type=whole_number(1),
        default=Default(20),
        metavar="N",
        help="a prompt of more tokens loses its beginning (what the window leaves; examples: 20)",
    )
    group.add_argument(
        "--max-gen-tokens",
        "--max-new-tokens",
        type=whole_number(1),
        default=Default(10),
        metavar="N",
        help="tokens to generate, at most (%(default)s)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """--temperature, --top-k, --top-p, --min-p, --seed, --repetition-penalty, --stop."""
    group = parser.add_argument_group(
        "sampling, with one of the first five; the others are then as generation_config.json says"
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", help="divides the logits; 0: greedy (1)"
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K likeliest tokens, 0: all (50)"
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest of probability P (1)"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="and of P times the likeliest one's (0)"
    )
    group.add_argument(
        "--seed",
        type=whole_number(0, MAX_SEED),
        metavar="N",
        help="of the draw: gives a prompt the same text, whatever the batch (a new one each time)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="makes tokens that were there already less likely, in greedy search, too (1)",
    )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="a text ends in front of it; may be given repeatedly",
    )


def read_sampling_options(args: argparse.Namespace) -> dict[str, float | None]:
    """What `Pretrained.generation_with` takes of them.

    Raises:
        UserError: for a --stop that is empty, or not UTF-8.
    """
    if "" in (args.stop or ()):
        raise UserError("--stop is empty; give it some text")
    for string in args.stop or ():
        if surrogate(string) is not None:
            raise UserError(f"--stop {string!r} is not UTF-8 text")
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty")
    return {name: getattr(args, name) for name in names}


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts that the options give, or the default ones."""
    prompts = list(args.prompt or ())
    if args.prompt_file:
        path = Path(args.prompt_file)
        text = read_text(path, "--prompt-file ")
        json = path.suffix in JSON_LINES
        prompts += json_rows(path, text, ("prompt", "text")) if json else _lines(text)
    if args.stdin:
        prompts += _lines(_standard_input())
    if not prompts:
        if args.prompt_file or args.stdin:
            raise UserError("there is no prompt: no line of what was given has text")
        return list(DEFAULT_PROMPTS)
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty; give it some text")
        if surrogate(prompt) is not None:
            raise UserError(f"prompt {number} is not UTF-8 text")
    return prompts


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("--stdin: standard input is closed")
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"--stdin: standard input cannot be read ({error.strerror})") from None
    return decode(data, "standard input")


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def tokenize(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    limit: int,
    note: Note = note,
) -> list[list[int]]:
    """Token ids of prompts; one of more than `limit` tokens loses its beginning, with a note.

    Raises:
        UserError: see `Tokenizer.encode`.
    """
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        length = tokenizer.count(prompt)
        if length > limit:
            note(
                f"prompt {number} has {length} tokens and loses its beginning; "
                f"--max-prompt-length is {limit}"
            )
        try:
            encoded.append(tokenizer.encode(prompt, limit if length > limit else None))
        except UserError as error:
            raise UserError(f"prompt {number}: {error}") from None
    return encoded
