"""What qllm_eval.py prints."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qllm import report

DIVERGENCE = (
    "KL: how far a model's next-token distribution is from the 16-bit reference's "
    "(Kullback-Leibler divergence, nats): 0 where they are the same; exp(KL mean) is the factor by "
    "which the perplexity of text that the reference itself writes grows"
)

SPREAD = (
    "±: a standard error over the text's windows, of one model; rows see the same windows, so that "
    "between them far less is chance"
)


def evaluation_lines(result: Mapping) -> list[str]:
    """What was measured of what, and a table with a row per model and bitwidth."""
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in result["rows"]))
    lines = [f"{result['model']}, {dtypes} on {result['device']}"]
    if result["dataset"]:
        about = result["dataset"]
        lines.append(f"{about['name']}: {about['tokens']} tokens, {about['words']} words")
    for name, about in result["conventions"].items():
        stride = f", stride {about['stride']}" if about["stride"] else ""
        lines.append(
            f"perplexity {name}: {about['about']}; {about['windows']} windows of up to "
            f"{about['window']} tokens{stride}, {about['tokens']} predicted"
        )
    if any(error for row in result["rows"] for error in row["perplexity_error"].values()):
        lines.append(SPREAD)
    lines += [f"{name}: {about['rows']} rows" for name, about in result["tasks"].items()]
    if result["rows"][0]["agreement"]:
        lines.append(DIVERGENCE)
    return [*lines, "", *report.table_lines(*table_of(result))]


def title_of(result: Mapping) -> str:
    """Which models were measured on what."""
    about = result["dataset"]
    text = f" on {about['name'].rpartition('/')[2]} ({about['tokens']} tokens)" if about else ""
    return result["model"] + text


def subtitle_of(result: Mapping) -> str:
    """How they were quantized, on which machine it was measured, and when."""
    rows, machine = result["rows"], result["machine"]
    parts = [part for row in rows for part in row["format"].split("; ")]
    grids = [part.partition(", ")[2] for part in parts]
    names = [row["algorithm"] for row in rows]
    hardware = machine["cpu"] if result["device"] == "cpu" else machine.get("gpu", result["device"])
    count = machine["threads"]
    threads = f"{count} thread{'s' if count > 1 else ''}" if result["device"] == "cpu" else ""
    facts = [*grids, *names, hardware, threads, result["date"]]
    return "; ".join(dict.fromkeys(fact for fact in facts if fact))


def label_of(result: Mapping, row: Mapping) -> str:
    """What tells a row from the others in few words."""
    if len(result["models"]) == 1:
        return report.label(row)
    alone = sum(other["model"] == row["model"] for other in result["rows"]) == 1
    return row["model"] if alone else f"{row['model']}, {report.label(row)}"


def line(row: Mapping) -> str:
    """A row in one line."""
    return ", ".join(f"{name} {value}" for name, value in cells(row, several=True).items() if value)


def table_of(result: Mapping) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row per model and bitwidth, transformers' last."""
    several = len(result["models"]) > 1
    rows = [cells(row, several=several) for row in result["rows"]]
    if "compare" in result:
        name = result["compare"]["name"]
        about = {"bitwidth": name, "model": name, "format": "16 bits", "algorithm": ""}
        rows.append(cells(result["compare"] | about, several=several))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return columns, [[row.get(name, "") for name in columns] for row in rows]


def cells(row: Mapping, *, several: bool) -> dict[str, str]:
    """A row of the JSON object as text, by column.

    Args:
        several: there are other models, so that bitwidths do not say which it is.
    """
    found = {"bitwidth": report.label(row)}
    if several:
        weights = report.label(row, "format")
        found = {"model": row["model"], "weights": weights, "algorithm": row["algorithm"]}
    found["MB"] = f"{row['bytes'] / 1e6:.2f}"
    for name, value in row["perplexity"].items():
        error = row["perplexity_error"].get(name)
        certain = error is None or not math.isfinite(error)
        found[f"perplexity {name}"] = f"{value:.2f}" + ("" if certain else f" ± {error:.2f}")
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
