"""The documentation's text and the commands in it: README.md, CONTRIBUTING.md and docs/."""

from __future__ import annotations

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
TEXT = "\n".join(PAGES.values())


def blocks() -> list[list[str]]:
    """The commands of each shell block, without their comments; a block that stands twice, once."""
    found = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = [[re.sub(r"\s+#.*", "", line) for line in block.splitlines()] for block in found]
    unique = dict.fromkeys(tuple(line for line in block if line) for block in lines)
    return [list(block) for block in unique]


def commands() -> list[str]:
    """The commands of all blocks."""
    return [command for block in blocks() for command in block]


# Their results are looked at in `tests/parallel/test_processes.py`.
TORCHRUN = [command for command in commands() if command.startswith("torchrun ")]
