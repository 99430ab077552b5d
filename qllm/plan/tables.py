"""Plans and fronts of plans in lines, as they are printed."""

from __future__ import annotations

from collections.abc import Sequence

from qllm import report
from qllm.memory import gigabytes
from qllm.plan.candidates import labels
from qllm.plan.planner import Plan

LARGE = 1e9  # bytes of a device, from which on they are said in GB


def plan_lines(name: str, plan: Plan) -> list[str]:
    """A plan as a table, and what it comes to."""
    candidates = plan.planner.sensitivity.candidates
    called = dict(zip(candidates, labels(candidates), strict=True))
    layers: dict[str, dict[str, str]] = {}
    for module, spec in plan.specs.items():
        # "layers.0.mlp.up" is a cell of the row "layers.0"; the LM head and the embedding are rows
        # with one.
        words = module.split(".")
        row, column = (".".join(words[:2]), ".".join(words[2:])) if words[2:] else (module, "")
        layers.setdefault(row, {})[column] = called[spec]
    # Of a model with experts some layers may have an MLP.
    columns = list(dict.fromkeys(c for cells in layers.values() for c in cells if c))
    rows = [
        [row, *(cells.get(column, "") for column in columns)]
        if "" not in cells
        else [row, cells[""], *[""] * (len(columns) - 1)]
        for row, cells in layers.items()
    ]
    costs = plan.solution.costs
    total = (
        f"{name}: {costs.bits:.3f} bits per weight, {report.megabytes(int(plan.nbytes))}; "
        f"divergence {plan.divergence:.3g} nats per token, predicted"
    )
    fit, gap = plan.planner.fit, plan.solution.gap
    better = (
        f"a better plan could be better by {gap:.2%} at most"
        if gap < 1
        else "how much better another one could be was not found out in the solver's time"
    )
    missed = f"predictions of mixed plans missed what was measured by {fit.error:.1%}; {better}"
    devices = [] if plan.planner.cluster is None else _device_lines(plan)
    return [*report.table_lines(["", *columns], rows), total, missed, *devices]


def _device_lines(plan: Plan) -> list[str]:
    """Where the layers are, and the times."""
    lines = []
    work, costs = plan.planner.work, plan.solution.costs
    held = [each for each in costs.held if each]
    bounds = [0, *plan.cuts, len(plan.solution.device)]
    for device, nbytes, begin, end in zip(plan.order, held, bounds, bounds[1:], strict=False):
        size = gigabytes if device.memory >= LARGE else report.megabytes
        lines.append(
            f"{device.name}: layers {begin / 2:g} to {end / 2:g}, {size(int(nbytes))} of "
            f"{size(int(device.memory))}"
        )
    lines.append(
        f"prompts of {work.batch} x {work.prompt}: {costs.prefill:.4g} s; a step: "
        f"{costs.decode * 1e3:.4g} ms; {work.batch * work.new / costs.slowest:.4g} tokens/s with "
        "all stages at work, predicted"
    )
    return lines


def front_lines(rows: Sequence[tuple[str, Plan]]) -> list[str]:
    """Plans, a row each: bits, bytes, divergence, and times where there are any."""
    timed = any(plan.planner.cluster is not None for _, plan in rows)
    columns = ["", "bits per weight", "MB", "divergence", *(["ms a token"] if timed else [])]
    cells = [
        [
            name,
            f"{plan.solution.costs.bits:.3f}",
            f"{plan.nbytes / 1e6:.2f}",
            f"{plan.divergence:.3g}",
            *([f"{plan.solution.costs.decode * 1e3:.4g}"] if timed else []),
        ]
        for name, plan in rows
    ]
    return report.table_lines(columns, cells)
