"""What qllm_bench.py prints."""

from __future__ import annotations

import csv as csv_files
import sys
from collections.abc import Mapping, Sequence

from qllm import report
from qllm.bench.tree import lines


def print_bench(result: Mapping, *, csv: bool = False) -> None:
    """Trees, latencies and the table of throughput, those that there are.

    Args:
        csv: the table alone, as comma-separated values.
    """
    if csv:
        write_csv(result["rows"])
        return
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    print(f"{result['model']} on {result['device']}, {threads}")
    for entry in result["trees"]:
        print()
        for line in lines(entry["tree"]):
            print(line)
    for predicted in result["tp_models"]:
        print()
        print_tp_model(predicted)
    for found in result["benchmarks"]:
        print_latency(found, result["dtype"])
    if result["rows"]:
        print()
        print_throughput(result)


def print_latency(found: Mapping, dtype: str) -> None:
    """The times of single tokens."""
    times = (f"{key} {1000 * found[key]:.3f} ms" for key in ("median", "p90", "p99", "mean"))
    print(
        f"\nbitwidth {report.label(found)}, {dtype}: {found['tokens']} tokens one by one, in "
        f"{found['sequences']} sequence{'s' if found['sequences'] > 1 else ''}"
    )
    print(f"time per token: {', '.join(times)} ({1 / found['mean']:.1f} tokens/s)")
    if found.get("perplexity") is not None:
        by_prefill = found.get("perplexity_by_prefill")
        print(f"perplexity: {found['perplexity']:.4f}, by prefill {by_prefill:.4f}")
    print(
        f"model: {report.megabytes(found['bytes'])}, "
        f"peak memory: {report.megabytes(found['peak_memory'])}"
    )


def print_tp_model(predicted: Mapping) -> None:
    """Times over ranks, as `qllm.parallel.cost.table` has them."""
    print(
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
    report.print_table(columns, rows)


def print_throughput(result: Mapping) -> None:
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
    report.print_table(columns, rows)
    if any(row["of_bandwidth"] is not None for row in result["rows"]):
        print(
            "\n(%): of what all threads read from memory, and multiply in int8, at most; measured "
            "before and after each row"
        )


def share(rate: float, of: float | None) -> str:
    """A rate, and its share of what the machine allows where that is known."""
    return f"{rate:.2f}" + ("" if of is None else f" ({of:.0%})")


def write_csv(rows: Sequence[Mapping]) -> None:
    """The rows, but for the single times."""
    names = [name for name in rows[0] if name != "seconds"]
    writer = csv_files.DictWriter(sys.stdout, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
