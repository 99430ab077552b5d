"""The README's text and the commands in it."""

from __future__ import annotations

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[list[str]]:
    """The commands of each of the README's shell blocks, without their comments."""
    found = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [[re.sub(r"\s+#.*", "", line) for line in block.splitlines()] for block in found]
    return [[line for line in block if line] for block in lines]


def commands() -> list[str]:
    """The commands of all blocks."""
    return [command for block in blocks() for command in block]


# Their results are looked at in `tests/parallel/test_processes.py`.
TORCHRUN = [command for command in commands() if command.startswith("torchrun ")]
