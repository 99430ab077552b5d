"""What qllm_eval.py prints."""

from __future__ import annotations

from collections.abc import Mapping

from qllm import report


def print_evaluation(result: Mapping) -> None:
    """What was measured of what, and a table with a row per bitwidth."""
    print(f"{result['model']}, {result['rows'][0]['dtype']} on {result['device']}")
    if result["dataset"]:
        about = result["dataset"]
        print(f"{about['name']}: {about['tokens']} tokens, {about['words']} words")
    for name, about in result["conventions"].items():
        stride = f", stride {about['stride']}" if about["stride"] else ""
        print(
            f"perplexity {name}: {about['about']}; {about['windows']} windows of up to "
            f"{about['window']} tokens{stride}, {about['tokens']} predicted"
        )
    for name, about in result["tasks"].items():
        print(f"{name}: {about['rows']} rows")
    print()
    report.print_table(*table_of(result))


def table_of(result: Mapping) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row per bitwidth, transformers' last."""
    rows = [cells(row) for row in result["rows"]]
    if "compare" in result:
        rows.append(cells(result["compare"] | {"bitwidth": result["compare"]["name"]}))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name, "") for name in columns] for row in rows]


def cells(row: Mapping) -> dict[str, str]:
    """A row of the JSON object as text, by column."""
    found = {"bitwidth": report.label(row), "MB": f"{row['bytes'] / 1e6:.2f}"}
    found |= {f"perplexity {name}": f"{value:.2f}" for name, value in row["perplexity"].items()}
    for name, task in row["tasks"].items():
        found[f"{name} accuracy"] = f"{task['accuracy']:.2%}"
        found[f"{name} perplexity"] = f"{task['perplexity']:.2f}"
    agreement = row["agreement"]
    if agreement is not None:
        found["KL mean"] = f"{agreement['kl']['mean']:.3g}"
        found["KL p99"] = f"{agreement['kl']['p99']:.3g}"
        found["same top token"] = f"{agreement['same_top']:.2%}"
        prefix = agreement["prefix"]
        found[f"same tokens, of {prefix['of']}"] = f"{prefix['mean']:.1f}"
    if row["tokens_per_second"] is not None:
        found["tokens/s"] = f"{row['tokens_per_second']:.0f}"
    return found
