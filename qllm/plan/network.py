"""What processes of this machine take that share a model, measured beside one that has it alone."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qllm.cgroups import usable_cpus
from qllm.config import QuantSpec
from qllm.models import Decoder
from qllm.parallel.links import CROWDED_SPIN, Links
from qllm.parallel.pipeline import ParallelContext, PipelineStage
from qllm.parallel.session import ParallelConfig, Session, session
from qllm.plan.devices import PHASES, STAGE_PASSES, Speed
from qllm.plan.random_model import random_decoder
from qllm.plan.ranks import run_ranks
from qllm.plan.shape import Workload
from qllm.plan.timing import time_generation, undisturbed

SMALL, LARGE = 256, 1 << 20  # activations of a step, and of prompts, in float16
ROUNDS = 5, 1  # in each of REPEATS rounds
FAMILY, VOCABULARY = ("opt", 32, 1), 64  # few tokens: the LM head leaves the stages alike


class Measured(NamedTuple):
    """A model of stages, and what it is asked.

    Attributes:
        sizes: hidden size and layers.
        repeats: rounds of the whole model and of its stages.
    """

    sizes: tuple[int, int]
    work: Workload
    repeats: int


# One whose steps take a fraction of a millisecond, so that what a stage takes besides is a large
# part of them: rounds of some 50 ms each. And one that no cache keeps, of some 0.3 s: a stage that
# has waited finds less in its caches, and those that work share the way to memory.
NEAR = Measured((256, 6), Workload(prompt=64, new=50), repeats=40)
FAR = Measured((1024, 16), Workload(prompt=16, new=24), repeats=10)


def measure_stages(
    threads: int, dtype: torch.dtype, speed: Speed
) -> tuple[dict[str, float], dict[str, Any]]:
    """Two processes play a message back and forth, then two and three are the stages of a model.

    Args:
        threads: of each.
        speed: of this machine with as many.

    Returns:
        `bandwidth` in bits per second and `latency` in seconds, as in a cluster's file; and
        `stage_passes`, `crowding` and `contention` as in that of a device: what a stage takes
        besides its layers and handing on, what it takes on top where there are more than
        processors, of three, and how much longer its layers take in steps while both work, of a
        model that no cache keeps.

    Raises:
        UserError: a process failed.
    """
    two, three = (
        _run_stages(threads, count, str(dtype).removeprefix("torch.")) for count in (2, 3)
    )
    network = _network(two)
    small = network["latency"]
    passes = {name: speed.step(1, decode=name == "decode") for name in PHASES}
    share = threads / usable_cpus()
    of_stage, crowded = (
        _of_stages(measured, count, small, share, passes)
        for measured, count in ((two, 2), (three, 3))
    )
    (_, alone), (_, busy) = two["far"]["alone"], two["far"]["all"]
    layers = busy / _at_once(2, share) - 2 * of_stage["busy_decode"]
    return network, {
        "contention": min(max(layers / (alone - passes["decode"]) - 1, 0.0), 1.0),
        "stage_passes": of_stage,
        "crowding": {name: max(0.0, crowded[name] - of_stage[name]) for name in STAGE_PASSES},
    }


def measure_hops(threads: int) -> dict[str, float]:
    """The first of what `measure_stages` returns alone: of a GPU stages of the CPU say nothing."""
    return _network(_run_stages(threads, 2, None))


def _run_stages(threads: int, count: int, dtype: str | None) -> dict[str, Any]:
    """What the processes print; with no type of activations, of the way between them alone."""
    return json.loads(run_ranks(__spec__.name, {"dtype": dtype}, [threads] * count, "stages"))


def _network(measured: Mapping[str, Any]) -> dict[str, float]:
    small, large = measured["hops"]
    return {"bandwidth": (LARGE - SMALL) * 16 / max(large - small, 1e-9), "latency": small}


def _of_stages(
    measured: dict[str, Any], stages: int, hop: float, share: float, passes: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each of STAGE_PASSES; of what is "near" and "far", and else as `_beside_layers`.

    Of what no cache keeps only steps of one sequence are told from what caches do: those of all are
    in `contention`.
    """
    near, far = (
        _beside_layers(measured[model], stages, hop, share, passes) for model in ("near", "far")
    )
    return near | {"far_decode": max(0.0, far["decode"] - near["decode"])}


def _beside_layers(
    measured: dict[str, list[float]],
    stages: int,
    hop: float,
    share: float,
    passes: Mapping[str, float],
) -> dict[str, float]:
    """Seconds, 0 or more, of a stage's passes besides its layers and hops, where caches are alike.

    Args:
        measured: seconds of prompts and of a step: "alone", and of as many stages with one
            sequence, "one", and with one for each, "all".
        share: of the processors, that a stage has threads for.
        passes: what the whole takes besides its layers, by PHASES.
    """
    (alone_prompt, alone), (prompt, step), (all_prompts, busy) = (
        measured[name] for name in ("alone", "one", "all")
    )
    prompt_layers, layers = alone_prompt - passes["prefill"], alone - passes["decode"]
    ways = stages - 1  # and as many by which the last stage tells the others its tokens
    at_once = _at_once(stages, share)
    # Behind the first sequence's prompt the stages end one after every turn.
    turn = (all_prompts - prompt) / ways
    found = {
        "prefill": prompt - prompt_layers - ways * hop,
        "busy_prefill": turn * stages / at_once - prompt_layers,
        "decode": step - layers - 2 * ways * hop,
        "busy_decode": busy / at_once - layers,
    }
    return {name: max(0.0, seconds) / stages for name, seconds in found.items()}


def _at_once(stages: int, share: float) -> float:
    """How many times as long stages take, that have more threads together than processors."""
    return max(1.0, stages * min(share, 1.0))


def _hops(stage: PipelineStage, values: int, rounds: int) -> list[float]:
    """Seconds of a message's way between two stages, of each round."""
    x = torch.zeros(1, values, dtype=torch.float16)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        if stage.first:
            stage.send(x)
        else:
            stage.recv(x)
        stage.broadcast(x)
        times.append((time.perf_counter() - start) / 2)
    return times


def _passes(
    joined: Session,
    dtype: torch.dtype,
    measured: Measured,
    between: Callable[[], object] = lambda: None,
) -> dict[str, tuple[float, float]]:
    """What `_beside_layers` takes.

    Args:
        between: called in each round, so that what it measures is of the same minute.
    """
    whole = _decoder(measured.sizes, dtype, None) if joined.rank == 0 else None
    part = _decoder(measured.sizes, dtype, joined.context())
    work, all_work = measured.work, replace(measured.work, batch=joined.world)
    runs: dict[str, list[tuple[float, float]]] = {"alone": [], "one": [], "all": []}
    for _ in range(measured.repeats):
        between()
        if whole is not None:  # for which the other processes wait
            runs["alone"].append(time_generation(whole, work, repeats=1))
        runs["one"].append(time_generation(part, work, repeats=1))
        runs["all"].append(time_generation(part, all_work, repeats=1))
    return _undisturbed(runs)


def _decoder(
    sizes: tuple[int, int], dtype: torch.dtype, parallel: ParallelContext | None
) -> Decoder:
    spec = QuantSpec.parse("4")
    return random_decoder(*FAMILY, *sizes, spec, dtype, "cpu", VOCABULARY, parallel)


def _undisturbed(runs: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Of what this process has measured, its prompts and its steps."""
    return {
        name: (undisturbed([prompt for prompt, _ in each]), undisturbed([step for _, step in each]))
        for name, each in runs.items()
        if each
    }


@contextmanager
def _crowded(links: Links) -> Iterator[None]:
    """Who waits for a message sleeps soon, as where ranks are more than processors."""
    before = links.spin, links.crowded
    links.spin, links.crowded = min(links.spin, CROWDED_SPIN), True
    try:
        yield
    finally:
        links.spin, links.crowded = before


def main() -> None:
    """One of the processes, which was told by its first argument."""
    told = json.loads(sys.argv[1])
    count = int(os.environ["WORLD_SIZE"])
    with session(ParallelConfig(pp=count)) as joined:
        joined.compare(told)
        stage = PipelineStage(joined.pp)
        hops: dict[int, list[float]] = {SMALL: [], LARGE: []}

        def send() -> None:
            for values, rounds in zip(hops, ROUNDS, strict=True):
                hops[values] += _hops(stage, values, rounds if count == 2 else 0)

        found: dict[str, object] = {}
        if told["dtype"] is None:
            for _ in range(NEAR.repeats):
                send()
        else:
            dtype = getattr(torch, told["dtype"])
            # Where there are more processors, three do not crowd them by themselves.
            with _crowded(joined.links) if count > 2 else nullcontext():
                near = _passes(joined, dtype, NEAR, send)
                found |= {"near": near, "far": _passes(joined, dtype, FAR)}
        if count == 2:
            found["hops"] = [undisturbed(times) for times in hops.values()]
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
