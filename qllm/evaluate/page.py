"""An evaluation as one HTML file that needs no other: tables, pictures, and the JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from qllm import report
from qllm.checkpoint.writer import new_file
from qllm.evaluate.plots import svg
from qllm.evaluate.table import table_of

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left }
td { font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto; background: white }
"""


def write(result: Mapping, path: Path) -> None:
    """Write the page, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(page(result), encoding="utf-8", errors="replace")


def page(result: Mapping) -> str:
    """The page of qllm_eval.py's JSON object."""
    title = f"{result['model']}: evaluation"
    columns, rows = table_of(result)
    facts = {
        "model": result["model"],
        "dtype": result["rows"][0]["dtype"],
        "device": result["device"],
    }
    if result["dataset"]:
        facts["text"] = "{name}, {tokens} tokens, SHA-256 {sha256}".format(**result["dataset"])
    for name, about in result["conventions"].items():
        facts[f"perplexity {name}"] = (
            f"{about['about']}; {about['windows']} windows of up to {about['window']} tokens"
        )
    facts |= {f"SHA-256 of the {name}": value for name, value in result["fingerprints"].items()}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    # "<" cannot end the element early when it is written so, and means the same in JSON.
    data = json.dumps(report.finite(dict(result)), ensure_ascii=False).replace("<", "\\u003c")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{table(columns, rows)}
{svg(result)}
<h2>What was measured</h2>
{table((), facts.items())}
<script type="application/json" id="result">{data}</script>
</body>
</html>
"""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text as an HTML table."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f"<table>\n{f'<thead><tr>{head}</tr></thead>' if head else ''}\n{body}</table>"
