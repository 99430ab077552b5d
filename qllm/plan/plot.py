"""The front of plans, drawn by matplotlib: loss against bytes, and against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qllm.checkpoint.writer import new_file
from qllm.evaluate.plots import plain
from qllm.plan.planner import Plan


def draw(
    path: Path, title: str, front: Sequence[Plan], uniform: Sequence[tuple[str, Plan]]
) -> None:
    """Write a picture of plans, and of uniform bits beside them.

    Args:
        path: its suffix says which kind.
        uniform: bitwidth and plan.
    """
    from matplotlib.figure import Figure

    timed = bool(front) and front[0].planner.cluster is not None
    figure = Figure(figsize=(12.0 if timed else 6.0, 4.2), layout="constrained")
    figure.suptitle(plain(title))
    axes = [("MB of weights", lambda plan: plan.nbytes / 1e6)]
    if timed:
        axes.append(("ms per token", lambda plan: plan.solution.costs.decode * 1e3))
    for index, (label, value) in enumerate(axes, 1):
        panel = figure.add_subplot(1, len(axes), index)
        panel.plot([value(p) for p in front], [p.divergence for p in front], "o-", label="planned")
        across, up = [value(p) for _, p in uniform], [p.divergence for _, p in uniform]
        panel.plot(across, up, "s--", label="uniform")
        for (bits, _), x, y in zip(uniform, across, up, strict=True):
            panel.annotate(f"{bits} bits", (x, y), textcoords="offset points", xytext=(4, 4))
        panel.set(xlabel=label, ylabel="divergence, nats per token", yscale="log")
        panel.legend()
        panel.grid(alpha=0.3)
    with new_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
