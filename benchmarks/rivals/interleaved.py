"""Models of several runtimes that are measured in turn, each runtime in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
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
    kv_bits: int
    layers: int | None
    bits: Sequence[str] | None

    def wants(self, bits: str) -> bool:
        """Whether models with weights of so many bits are measured."""
        return self.bits is None or bits in self.bits


def measure(model: Model, batch: int | None, settings: Settings) -> tuple[float, float]:
    """Seconds of a prompt, or of a step of a batch; and bytes per second of memory meanwhile."""
    from qllm.ops.cpu.limits import read_bandwidth

    before = read_bandwidth()
    if batch is None:
        seconds = model.prefill(settings.prompt)
    else:
        seconds = model.decode(batch, settings.context, settings.steps)
    return seconds, (before + read_bandwidth()) / 2


def serve(rival: str, repository: str, folder: str, settings: Settings, pipe: Connection) -> None:
    """A rival's process: loads its models, then measures what it is sent: a model, a batch."""
    load = MODEL_RIVALS[rival].load().models
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        models = [*load(repository, settings, Path(folder), stack)]
        pipe.send([model.facts for model in models])
        while True:
            index, batch = pipe.recv()
            pipe.send(measure(models[index], batch, settings))


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
        found = {}
        for _, batch in itertools.product(range(rounds), (None, *settings.batches)):
            for number, (rival, pipe, index, _) in enumerate(models):
                pipe.send((index, batch))
                found.setdefault((number, batch), []).append(received(pipe, rival))
        return [
            {"rival": rival, **facts}
            | medians(facts["bytes"], {b: found[number, b] for b in (None, *settings.batches)})
            for number, (rival, _, _, facts) in enumerate(models)
        ]


def medians(size: int, found: dict[int | None, list[tuple[float, float]]]) -> dict[str, object]:
    """Over the rounds of a model; the share of what memory allows is a median of shares."""
    seconds = {batch: statistics.median(s for s, _ in rounds) for batch, rounds in found.items()}
    prefill = seconds.pop(None)
    steps = found[next(iter(seconds))]
    return {
        "bandwidth": statistics.median(bandwidth for _, bandwidth in steps),
        "share": statistics.median(size / s / bandwidth for s, bandwidth in steps),
        "prefill": prefill,
        "decode": seconds,
    }


def received(pipe: Connection, rival: str) -> Any:
    """What a rival's process sends."""
    try:
        return pipe.recv()
    except EOFError:
        raise UserError(f"{rival} ended early; --rivals with the others runs without it") from None
