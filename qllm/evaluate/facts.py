"""What a result says besides its rows: of the text, the windows, the samples and the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qllm.evaluate import provenance
from qllm.evaluate.agreement import ReferenceOutputs
from qllm.evaluate.perplexity import CONVENTIONS, Cut, Text, count_bytes, count_words
from qllm.hub import ModelFolder
from qllm.tokenizer import Tokenizer


def of_text(name: str, text: Text | None) -> dict[str, Any] | None:
    """Which text it was; None without one."""
    if text is None:
        return None
    return {
        "name": name,
        "sha256": provenance.of_text(text.text),
        "bytes": count_bytes(text.text),
        "words": count_words(text.text),
        "tokens": len(text.ids),
    }


def of_tasks(tasks: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """How many rows each task has, and their hash."""
    return {
        name: {"rows": len(rows), "sha256": provenance.of_text("\0".join(rows))}
        for name, rows in tasks.items()
    }


def of_cuts(cuts: Sequence[Cut]) -> dict[str, dict]:
    """How perplexity was measured, by convention."""
    return {
        name: {
            "about": CONVENTIONS[name].about,
            "window": part.window,
            "stride": part.stride,
            "windows": len(part.windows.windows),
            "tokens": part.tokens,
        }
        for part in cuts
        for name in part.names
    }


def of_samples(
    tokenizer: Tokenizer, reference: ReferenceOutputs | None, rows: Sequence[Mapping]
) -> list[dict]:
    """The first prompts of agreement: `prompt`, what `reference` makes of it, and each of `rows`.

    The tokens of the rows, `samples`, are taken out of them.
    """
    if reference is None or any(row["agreement"] is None for row in rows):
        return []
    columns = [row["agreement"].pop("samples") for row in rows]
    return [
        {
            "prompt": tokenizer.decode(list(prompt)),
            "reference": tokenizer.continuation(list(prompt), theirs),
            "rows": [tokenizer.continuation(list(prompt), tokens) for tokens in ours],
        }
        for prompt, theirs, *ours in zip(
            reference.prompts, reference.tokens, *columns, strict=False
        )
    ]


def of_files(
    folders: Sequence[ModelFolder], names: Sequence[str], others: Sequence[Sequence[Path]]
) -> dict[str, dict]:
    """Hashes of the files of each model, by its name.

    Args:
        others: the files of one that is no checkpoint; empty for one that is.
    """
    return {
        name: {
            "model": provenance.of_files([folder.path / "config.json", *files])
            if files
            else provenance.of_model(folder.path),
            "tokenizer": provenance.of_tokenizer(folder.path),
        }
        for folder, name, files in zip(folders, names, others, strict=True)
    }
