"""Pictures of an evaluation, by matplotlib: quality against bytes, error per layer."""

from __future__ import annotations

import importlib.util
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qllm.checkpoint.writer import new_file
from qllm.errors import UserError
from qllm.evaluate.table import DIVERGENCE, label_of, subtitle_of, title_of
from qllm.folders import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
PANEL, COLUMNS = (6.0, 4.2), 3  # inches
LETTERS = 70  # of a title that fit above a panel
MARKERS = "osD^vP*X"
DENSE = "16 bits"  # the format of a row that is not quantized

Panel = tuple[str, Callable[["Axes"], None]]


def check(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse, before anything is measured, a picture that could not be drawn or kept.

    Raises:
        UserError: without matplotlib, for a folder that is not there, or another kind of file.
    """
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: give a name that ends in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            f"{option} needs matplotlib, which is not installed; pip install matplotlib"
        )
    check_writable(path)


def figure(result: Mapping, panels: Sequence[Panel] | None = None) -> Figure:
    """Pictures in rows of COLUMNS.

    Args:
        result: qllm_eval.py's JSON object.
        panels: which ones, without a title; None: all that there is something for, with one.
    """
    from matplotlib.figure import Figure

    titled, panels = panels is None, list_panels(result) if panels is None else panels
    rows, columns = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
    whole = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    for index, (title, draw) in enumerate(panels, 1):
        axes = whole.add_subplot(rows, columns, index)
        axes.set_title(plain(title))
        axes.grid(alpha=0.3)
        draw(axes)
    if titled:
        lines = [title_of(result), subtitle_of(result)]
        if result["rows"][0]["agreement"]:
            lines.append(DIVERGENCE)
        width = LETTERS * columns
        whole.suptitle("\n".join(textwrap.fill(plain(line), width) for line in lines), fontsize=11)
    return whole


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: it takes what stands between dollar signs for a formula,
    leaves labels out of legends that begin with an underscore, and draws no half surrogates."""
    text = text.encode(errors="replace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def list_panels(result: Mapping) -> list[Panel]:
    """Title and drawing of each picture that there is something for."""
    rows, panels = result["rows"], []
    for name in result["conventions"]:
        values = [row["perplexity"][name] for row in rows]
        title = f"perplexity ({name}) against bytes"
        base = baseline(result, _at("perplexity", name))
        panels.append((title, _against_bytes(result, values, "perplexity", base)))
    for name in result["tasks"]:
        values = [row["tasks"][name]["accuracy"] for row in rows]
        base = baseline(result, _at("tasks", name, "accuracy"))
        panels.append((f"{name} against bytes", _against_bytes(result, values, "accuracy", base)))
    if all(row["agreement"] for row in rows):
        values = [row["agreement"]["kl"]["mean"] for row in rows]
        draw = _against_bytes(result, values, "mean KL divergence, nats", log=True)
        panels.append(("divergence from the reference", draw))
        panels.append(("error of each layer's output", _layers(result)))
    return panels


def baseline(result: Mapping, value: Callable[[Mapping], float]) -> tuple[str, float] | None:
    """Name and figure of what was measured at 16 bits: transformers, or a row; None without one."""
    if "compare" in result:
        return result["compare"]["name"], value(result["compare"])
    dense = [row for row in result["rows"] if row["format"] == DENSE]
    return (label_of(result, dense[0]), value(dense[0])) if dense else None


def _at(*keys: str) -> Callable[[Mapping], float]:
    """What stands in a row under these keys, one within the other."""

    def value(row: Mapping) -> float:
        found: Any = row
        for key in keys:
            found = found[key]
        return found

    return value


def _against_bytes(
    result: Mapping,
    values: Sequence[float],
    label: str,
    base: tuple[str, float] | None = None,
    *,
    log: bool = False,
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        points = [
            (row["bytes"] / 1e6, value, plain(label_of(result, row)))
            for row, value in zip(result["rows"], values, strict=True)
        ]
        if len(result["models"]) == 1:
            points.sort()
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
            for x, y, name in points:
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5))
        else:  # of the same bytes, whose names would be written over each other
            for (x, y, name), marker in zip(points, itertools.cycle(MARKERS)):
                axes.plot([x], [y], marker=marker, linestyle="none", markersize=8, label=name)
        if base is not None:
            name, value = base
            axes.axhline(value, color="gray", linestyle="--", label=plain(f"{name}: {value:.4g}"))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        axes.margins(x=0.1)  # space for the last one's name
        axes.set_xlabel("MB")
        axes.set_ylabel(label)
        if log and all(y > 0 for y in values):
            axes.set_yscale("log")

    return draw


def _layers(result: Mapping) -> Callable[[Axes], None]:
    rows = result["rows"]

    def draw(axes: Axes) -> None:
        for row in rows:
            errors = row["agreement"]["layers"]
            axes.plot(range(len(errors)), errors, marker=".", label=plain(label_of(result, row)))
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error")
        if all(error > 0 for row in rows for error in row["agreement"]["layers"]):
            axes.set_yscale("log")
        title = "bitwidth" if len(result["models"]) == 1 else None
        axes.legend(title=title, fontsize="small")

    return draw


def save(result: Mapping, path: Path) -> None:
    """Write the pictures to a file whose name says what kind it is; whole, or not at all."""
    with new_file(path) as temporary:
        figure(result).savefig(temporary, dpi=150, format=path.suffix[1:])


def svgs(result: Mapping) -> list[str]:
    """Each picture as an <svg> element, its text as text."""
    import matplotlib

    found = []
    for number, panel in enumerate(list_panels(result)):
        file = io.StringIO()
        settings: Any = {"svg.fonttype": "none", "svg.hashsalt": f"qllm {number}"}
        with matplotlib.rc_context(settings):
            figure(result, [panel]).savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
        # Names of parts, which nothing refers to, would be there once in each picture.
        found.append(re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<svg") :]))
    return found
