"""An evaluation as one HTML file that needs no other: tables, pictures, and the JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from qllm import report
from qllm.checkpoint.writer import new_file
from qllm.evaluate.plots import svgs
from qllm.evaluate.table import DIVERGENCE, label_of, subtitle_of, table_of, title_of

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1, h2, h3, p, td { overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25 }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left }
th, td { vertical-align: top }
.texts td:first-child { overflow-wrap: normal }
.wide th, .wide td { white-space: nowrap }
td { font-variant-numeric: tabular-nums }
.pictures { display: grid; gap: 1rem }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
svg { width: 100%; height: auto; background: white }
"""


def write(result: Mapping, path: Path) -> None:
    """Write the page, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(page(result), encoding="utf-8", errors="replace")


def page(result: Mapping) -> str:
    """The page of qllm_eval.py's JSON object."""
    title = title_of(result)
    columns, rows = table_of(result)
    facts = {
        "models": result["model"],
        "dtype": result["rows"][0]["dtype"],
        "device": result["device"],
    }
    if result["dataset"]:
        facts["text"] = "{name}, {tokens} tokens, SHA-256 {sha256}".format(**result["dataset"])
    for name, about in result["conventions"].items():
        facts[f"perplexity {name}"] = (
            f"{about['about']}; {about['windows']} windows of up to {about['window']} tokens"
        )
    for model, hashes in result["fingerprints"].items():
        facts |= {f"SHA-256 of {model}'s {name}": value for name, value in hashes.items()}
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
<p>{escape(subtitle_of(result))}</p>
<div class="wide">{table(columns, rows)}</div>
{f"<p>{escape(DIVERGENCE)}.</p>" if result["rows"][0]["agreement"] else ""}
<div class="pictures">
{"".join(svgs(result))}
</div>
{samples(result)}
<h2>What was measured</h2>
{table((), facts.items())}
<script type="application/json" id="result">{data}</script>
</body>
</html>
"""


def samples(result: Mapping) -> str:
    """Prompts with the texts of the reference and of each row, where agreement was measured."""
    if not result["samples"]:
        return ""
    names = ["reference", *(label_of(result, row) for row in result["rows"])]
    parts = ["<h2>Greedy text</h2>"]
    for sample in result["samples"]:
        texts = [sample["reference"], *sample["rows"]]
        parts.append(f"<h3>{escape(sample['prompt'])} …</h3>")
        parts.append(f'<div class="texts">{table((), zip(names, texts, strict=True))}</div>')
    return "\n".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Text as an HTML table."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f"<table>\n{f'<thead><tr>{head}</tr></thead>' if head else ''}\n{body}</table>"
