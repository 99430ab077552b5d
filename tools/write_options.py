"""Write docs/options.md from the scripts' own parsers.

    python3 -m tools.write_options

A test holds the file to what this would write.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from unittest.mock import patch

from qllm import cli
from qllm.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "options.md"
INTRODUCTION = """# Options

What `--help` of each script says, in one table; `python3 -m tools.write_options` writes this page.
"""
ENDING = """
Models come from the Hugging Face Hub, by its own client: `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN`
mean what they always mean. QLLM keeps converted copies and statistics in `QLLM_HOME`, else in
`qllm` in `XDG_CACHE_HOME` (`~/.cache`); where there is no home, or none that can be written to, in
`/tmp/qllm-UID`. Results go to standard output, notes and progress to standard error. A mistake is
one line and status 2.
"""


class Found(Exception):  # noqa: N818 - no error, but the way out of a script's parse_args
    """Carries a script's parser."""


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script makes."""

    def give(parser: argparse.ArgumentParser, *args: object) -> None:
        raise Found(parser)

    with patch.object(cli.Parser, "parse_args", give):
        try:
            importlib.import_module(script).parse_args()
        except Found as found:
            return found.args[0]
    raise AssertionError(f"{script} parsed nothing")


def options() -> dict[str, list[tuple[str, argparse.Action]]]:
    """By the names of each option: the scripts that have it, and how."""
    found: dict[str, list[tuple[str, argparse.Action]]] = {}
    for script in COMMANDS.values():
        for action in parser_of(script)._actions:
            if action.option_strings and action.dest != "help":
                found.setdefault(action.option_strings[0], []).append((script, action))
    return found


def page() -> str:
    """The text of docs/options.md."""
    rows = ["| option | scripts | meaning (default) |", "|---|---|---|"]
    for uses in options().values():
        # The same option may say something else in another script; each row has its scripts.
        by_row: dict[tuple[str, str], list[str]] = {}
        for script, action in uses:
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            by_row.setdefault((names + _value(action), _meaning(action)), []).append(short(script))
        for (option, meaning), scripts in by_row.items():
            where = "all" if len(scripts) == len(COMMANDS) else ", ".join(scripts)
            rows.append(f"| {option} | {where} | {meaning} |")
    return "\n".join([INTRODUCTION, *rows, ENDING])


def short(script: str) -> str:
    """qllm_gen -> gen, ref_gen -> ref, fake_calib_gen -> calib, weight_convert -> convert."""
    names = {"fake_calib_gen": "calib", "ref_gen": "ref", "weight_convert": "convert"}
    return names.get(script, script.removeprefix("qllm_"))


def _value(action: argparse.Action) -> str:
    if action.choices:
        return " " + " / ".join(f"`{choice}`" for choice in action.choices)
    return f" {action.metavar}" if action.metavar and action.nargs != 0 else ""


def _meaning(action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": "the script"}
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page."""
    TARGET.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
