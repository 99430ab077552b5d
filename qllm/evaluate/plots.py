"""Pictures of an evaluation, by matplotlib: quality against bytes, error per layer."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qllm.checkpoint.writer import new_file
from qllm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
PANEL, COLUMNS = (6.0, 4.2), 3  # inches

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


def figure(result: Mapping) -> Figure:
    """The pictures of what qllm_eval.py's JSON object holds, in rows of COLUMNS."""
    from matplotlib.figure import Figure

    panels = list_panels(result)
    rows, columns = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
    whole = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    for place, (title, draw) in enumerate(panels, 1):
        axes = whole.add_subplot(rows, columns, place)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        draw(axes)
    return whole


def list_panels(result: Mapping) -> list[Panel]:
    """Title and drawing of each picture that there is something for."""
    rows, panels = result["rows"], []
    for name in result["conventions"]:
        values = [row["perplexity"][name] for row in rows]
        panels.append(
            (f"perplexity ({name}) against bytes", _against_bytes(rows, values, "perplexity"))
        )
    for name in result["tasks"]:
        values = [row["tasks"][name]["accuracy"] for row in rows]
        panels.append((f"{name} against bytes", _against_bytes(rows, values, "accuracy")))
    if all(row["agreement"] for row in rows):
        values = [row["agreement"]["kl"]["mean"] for row in rows]
        label = "mean KL divergence, nats"
        panels.append(
            ("divergence from the reference", _against_bytes(rows, values, label, log=True))
        )
        panels.append(("error of each layer's output", _layers(rows)))
    return panels


def _against_bytes(
    rows: Sequence[Mapping], values: Sequence[float], label: str, *, log: bool = False
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        points = sorted(
            (row["bytes"] / 1e6, value, row["bitwidth"])
            for row, value in zip(rows, values, strict=True)
        )
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
        for x, y, name in points:
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 5))
        axes.margins(x=0.1)  # room for the last one's name
        axes.set_xlabel("MB")
        axes.set_ylabel(label)
        if log and all(y > 0 for y in values):
            axes.set_yscale("log")

    return draw


def _layers(rows: Sequence[Mapping]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for row in rows:
            errors = row["agreement"]["layers"]
            axes.plot(range(len(errors)), errors, marker=".", label=row["bitwidth"])
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error")
        if all(error > 0 for row in rows for error in row["agreement"]["layers"]):
            axes.set_yscale("log")
        axes.legend(title="bitwidth", loc="center left", bbox_to_anchor=(1, 0.5))

    return draw


def save(result: Mapping, path: Path) -> None:
    """Write the pictures to a file whose name says what kind it is; whole, or not at all."""
    with new_file(path) as temporary:
        figure(result).savefig(temporary, dpi=150, format=path.suffix[1:])


def svg(result: Mapping) -> str:
    """The pictures as an <svg> element, its text as text."""
    import matplotlib

    file = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "qllm"}
    with matplotlib.rc_context(settings):
        figure(result).savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
