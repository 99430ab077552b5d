"""The chat templates of a checkpoint folder, wherever transformers may have put them."""

from __future__ import annotations

from pathlib import Path

from qllm.files import read_bytes, read_json
from qllm.gguf.tokenizer import DEFAULT_TEMPLATE
from qllm.hub import TEMPLATES

SINGLE = "chat_template.jinja"
# Where models that take images had it, from which transformers reads it with the images' processor.
OF_PROCESSOR = "chat_template.json"


def read_templates(folder: Path) -> dict[str, str]:
    """The source of each by its name; the one that a conversation takes is DEFAULT_TEMPLATE.

    Files of their own take the place of all that tokenizer_config.json has, as in transformers.

    Raises:
        UserError: for a file that cannot be read.
    """
    files = {path.stem: path for path in sorted(folder.glob(TEMPLATES)) if path.exists()}
    if (folder / SINGLE).exists():
        files = {DEFAULT_TEMPLATE: folder / SINGLE} | files
    if files:
        return {name: read_bytes(path).decode("utf-8", "replace") for name, path in files.items()}
    stored = None
    for name in ("tokenizer_config.json", OF_PROCESSOR):
        path = folder / name
        if stored is None and path.exists():
            stored = read_json(path).get("chat_template")
    if isinstance(stored, list):  # of several by name
        named = {e.get("name"): e.get("template") for e in stored if isinstance(e, dict)}
    else:
        named = {DEFAULT_TEMPLATE: stored}
    return {k: v for k, v in named.items() if isinstance(k, str) and isinstance(v, str)}
