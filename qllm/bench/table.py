"""What qllm_bench.py prints."""

from __future__ import annotations

import csv as csv_files
import io
from collections.abc import Mapping, Sequence

from qllm import report
from qllm.bench.tree import lines


def bench_lines(result: Mapping, *, csv: bool = False) -> list[str]:
    """Trees, latencies and the table of throughput, those that there are.

    Args:
        csv: the table alone, as comma-separated values.
    """
    if csv:
        return csv_lines(result["rows"])
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    found = [f"{result['model']} on {result['device']}, {threads}"]
    for entry in result["trees"]:
        found += ["", *lines(entry["tree"])]
    for predicted in result["tp_models"]:
        found += ["", *tp_model_lines(predicted)]
    for measured in result["benchmarks"]:
        found += ["", *latency_lines(measured, result["dtype"])]
    if result["rows"]:
        found += ["", *throughput_lines(result)]
    return found


def latency_lines(found: Mapping, dtype: str) -> list[str]:
    """The times of single tokens."""
    times = (f"{key} {1000 * found[key]:.3f} ms" for key in ("median", "p90", "p99", "mean"))
    said = [
        f"bitwidth {report.label(found)}, {dtype}: {found['tokens']} tokens one by one, in "
        f"{found['sequences']} sequence{'s' if found['sequences'] > 1 else ''}",
        f"time per token: {', '.join(times)} ({1 / found['mean']:.1f} tokens/s)",
    ]
    if found.get("perplexity") is not None:
        by_prefill = found.get("perplexity_by_prefill")
        said.append(f"perplexity: {found['perplexity']:.4f}, by prefill {by_prefill:.4f}")
    said.append(
        f"model: {report.megabytes(found['bytes'])}, "
        f"peak memory: {report.megabytes(found['peak_memory'])}"
    )
    return said


def tp_model_lines(predicted: Mapping) -> list[str]:
    """Times over ranks, as `qllm.parallel.cost.table` has them."""
    title = (
        f"bitwidth {report.label(predicted)}, by calculation: each token reads "
        f"{report.megabytes(predicted['bytes'])} of weights, at "
        f"{predicted['bandwidth'] / 1e9:.1f} GB/s on each rank"
    )
    columns = ("ranks", "Gbit/s", "mode", "ms/token", "in exchanges", "KB sent/token", "speedup")
    rows = [
        (
            str(row["ranks"]),
            "" if row["gbit"] is None else f"{row['gbit']:.0f}",
            row["mode"] or "",
            f"{row['ms']:.2f}",
            f"{row['communication']:.2f}",
            f"{row['kilobytes']:.0f}",
            f"{row['speedup']:.1f}",
        )
        for row in predicted["rows"]
    ]
    return [title, *report.table_lines(columns, rows)]


def throughput_lines(result: Mapping) -> list[str]:
    """A row per bitwidth and test."""
    columns = ("bitwidth", "dtype", "MB", "threads", "batch", "test", "tokens/s", "GB/s", "TOP/s")
    rows = [
        (
            report.label(row),
            result["dtype"],
            f"{row['bytes'] / 1e6:.2f}",
            str(result["threads"]),
            str(row["batch"]),
            row["test"],
            f"{row['tokens_per_second']:.2f} ± {row['deviation']:.2f}",
            share(row["gigabytes_per_second"], row["of_bandwidth"]),
            share(row["teraops_per_second"], row["of_arithmetic"]),
        )
        for row in result["rows"]
    ]
    found = report.table_lines(columns, rows)
    if any(row["of_bandwidth"] is not None for row in result["rows"]):
        found += [
            "",
            "(%): of what all threads read from memory, and multiply in int8, at most; measured "
            "before and after each row",
        ]
    return found


def share(rate: float | None, of: float | None) -> str:
    """A rate, and its share of what the machine allows, where they are known."""
    if rate is None:
        return ""
    return f"{rate:.2f}" + ("" if of is None else f" ({of:.0%})")


def csv_lines(rows: Sequence[Mapping]) -> list[str]:
    """The rows, but for the single times."""
    names = [name for name in rows[0] if name != "seconds"]
    text = io.StringIO()
    writer = csv_files.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().removesuffix("\n").split("\n")
