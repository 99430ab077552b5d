"""Models of several runtimes that are measured in turn, each runtime in a process of its own."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rivals import MODEL_RIVALS
from qllm.errors import UserError

if TYPE_CHECKING:
    from benchmarks.rivals.common import Model


@dataclass(frozen=True)
class Settings:
    """What is measured of each model: see the options of the benchmark."""

    threads: int
    prompt: int
    batches: Sequence[int]
    context: int
    steps: int


def model_times(model: Model, settings: Settings) -> dict[str, object]:
    """Of one model in one round, and how fast memory was read meanwhile."""
    from qllm.ops.cpu.limits import read_bandwidth

    prefill, before = model.prefill(settings.prompt), read_bandwidth()
    first, *others = settings.batches
    decode = {first: model.decode(first, settings.context, settings.steps)}
    bandwidth = (before + read_bandwidth()) / 2
    decode |= {b: model.decode(b, settings.context, settings.steps) for b in others}
    return {"prefill": prefill, "decode": decode, "bandwidth": bandwidth}


def medians(size: int, rounds: list[dict]) -> dict[str, object]:
    """Over the rounds of a model; the share of what memory allows is a median of shares."""
    first, *_ = rounds[0]["decode"]
    shares = [size / each["decode"][first] / each["bandwidth"] for each in rounds]
    return {
        "bandwidth": statistics.median(each["bandwidth"] for each in rounds),
        "share": statistics.median(shares),
        "prefill": statistics.median(each["prefill"] for each in rounds),
        "decode": {
            batch: statistics.median(each["decode"][batch] for each in rounds)
            for batch in rounds[0]["decode"]
        },
    }


def serve(rival: str, repository: str, folder: str, settings: Settings, pipe: Connection) -> None:
    """A rival's process: loads its models, then measures the one that it is sent the number of."""
    load = MODEL_RIVALS[rival].load().models
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        models = [*load(repository, settings.threads, Path(folder), stack)]
        pipe.send([model.facts for model in models])
        while True:
            pipe.send(model_times(models[pipe.recv()], settings))


@contextlib.contextmanager
def process_of(rival: str, *args: object) -> Iterator[Connection]:
    """A rival in a process of its own, for threads that wait busily slow down those of others."""
    ours, its = Pipe()
    process = get_context("spawn").Process(target=serve, args=(rival, *args, its), daemon=True)
    process.start()
    its.close()
    with ours:
        yield ours
    process.join()


def measure_models(
    repository: str, rivals: Sequence[str], settings: Settings, rounds: int
) -> list[dict[str, object]]:
    """A row per rival and format.

    Raises:
        UserError: a rival's process ends.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        models = []
        for rival in rivals:
            pipe = stack.enter_context(process_of(rival, repository, folder, settings))
            models += [(rival, pipe, *known) for known in enumerate(received(pipe, rival))]
        times = []
        for _ in range(rounds):
            times.append([])
            for rival, pipe, index, _ in models:
                pipe.send(index)
                times[-1].append(received(pipe, rival))
        return [
            {"rival": rival, **facts, **medians(facts["bytes"], list(of_model))}
            for (rival, _, _, facts), of_model in zip(models, zip(*times, strict=True), strict=True)
        ]


def received(pipe: Connection, rival: str) -> Any:
    """What a rival's process sends."""
    try:
        return pipe.recv()
    except EOFError:
        raise UserError(f"{rival} ended early; --rivals with the others runs without it") from None
