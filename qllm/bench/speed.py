"""Tokens per second of prefill and decode, and of what the machine allows; token by token."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qllm.bench.runners import Runner
from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.evaluate.agreement import quantile
from qllm.evaluate.perplexity import exp
from qllm.ops.cpu import build
from qllm.ops.cpu.limits import int8_rate, read_bandwidth
from qllm.ops.gpu import limits as gpu

PERCENTILES = (90, 99)
FIRST_STEPS = 2  # of a cache: what they do is recorded, on a GPU captured, for those that follow


class Case(NamedTuple):
    """What is timed: `llama-bench`'s pp or tg of so many tokens, of so many sequences at once."""

    kind: str
    tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.tokens}"


@dataclass(frozen=True)
class Roofline:
    """What the machine does at most.

    Attributes:
        bandwidth: bytes that all threads read from memory in a second; on a GPU, that a copy
            reads and writes.
        arithmetic: operations in a second of int8 products, two for each; on a GPU, of bfloat16.
    """

    bandwidth: float
    arithmetic: float

    @classmethod
    def measure(cls, device: torch.device | str) -> Roofline | None:
        """By our kernels, on a GPU by torch's; None where there are none."""
        device = torch.device(device)
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return None
            return cls(gpu.copy_bandwidth(device), _arithmetic(device))
        if device.type != "cpu":
            return None
        try:
            return cls(read_bandwidth(), _arithmetic(device))
        except build.Unavailable:
            return None


@cache
def _arithmetic(device: torch.device) -> float:
    """Which drifts less than memory does, and takes longer to measure."""
    return int8_rate() if device.type == "cpu" else gpu.product_rate(device)


def cases(
    config: ModelConfig, prompts: Sequence[int], news: Sequence[int], batches: Sequence[int]
) -> list[Case]:
    """Every combination of a kind, a length and a batch; a length of 0 stands for none.

    Raises:
        UserError: for more tokens than the model's window holds.
    """
    found = [
        Case(kind, count, batch)
        for batch in batches
        for kind, counts in (("pp", prompts), ("tg", news))
        for count in counts
        if count
    ]
    longest = config.max_positions
    for case in found:
        needed = context(case)
        if longest is not None and needed > longest:
            raise UserError(
                f"{case} takes {needed} tokens of context; the model's window is {longest}"
            )
    return found


def context(case: Case) -> int:
    """Tokens of a sequence at the end of a case."""
    return case.tokens + (1 + FIRST_STEPS if case.kind == "tg" else 0)


def seconds_of(runner: Runner, case: Case, vocab_size: int) -> float:
    """One run of a case: random tokens; decode begins behind one token, after steps that are not
    counted."""
    draw = torch.Generator().manual_seed(0)
    length = case.tokens if case.kind == "pp" else 1
    prompts = torch.randint(vocab_size, (case.batch, length), generator=draw).tolist()
    runner.begin(case.batch, context(case))
    if case.kind == "pp":
        return timed(lambda: runner.prefill(prompts))[0]
    logits = runner.prefill(prompts)
    for _ in range(FIRST_STEPS):
        logits = runner.step(logits.argmax(-1))

    def steps() -> None:
        nonlocal logits
        for _ in range(case.tokens):
            logits = runner.step(logits.argmax(-1))

    return timed(steps)[0]


def timed(run: Callable[[], Tensor | None]) -> tuple[float, Tensor | None]:
    """Seconds that a call takes, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(
    runners: Sequence[Runner], case: Case, repeats: int, config: ModelConfig, device: str
) -> list[dict[str, Any]]:
    """A case on each of some runners, in turn, `repeats` times after one that is not counted.

    Returns:
        of each runner, `test`, `batch`, `tokens_per_second` and its `deviation`, `seconds` of each
        run, `bytes`; `gigabytes_per_second` and `teraops_per_second`, and their shares of what the
        machine allows, measured before and after: None where they cannot be told.
    """
    before = Roofline.measure(device)
    times: list[list[float]] = [[] for _ in runners]
    for repeat in range(repeats + 1):
        for runner, kept in zip(runners, times, strict=True):
            seconds = seconds_of(runner, case, config.vocab_size)
            if repeat:
                kept.append(seconds)
    after = Roofline.measure(device)
    roofline = None
    if before and after:
        roofline = replace(before, bandwidth=(before.bandwidth + after.bandwidth) / 2)
    return [_row(runner, case, kept, roofline) for runner, kept in zip(runners, times, strict=True)]


def _row(
    runner: Runner, case: Case, seconds: list[float], roofline: Roofline | None
) -> dict[str, Any]:
    count = case.tokens * case.batch
    rates = [count / each for each in seconds]
    median = statistics.median(seconds)
    passes = case.tokens if case.kind == "tg" else 1
    nbytes = runner.read_bytes(count // passes)
    read = None if nbytes is None else passes * nbytes / median
    done = 2 * count * runner.multiplied / median
    return {
        "test": str(case),
        "batch": case.batch,
        "bytes": runner.nbytes,
        "tokens_per_second": statistics.mean(rates),
        "deviation": statistics.stdev(rates) if len(rates) > 1 else 0.0,
        "seconds": seconds,
        "gigabytes_per_second": None if read is None else read / 1e9,
        "of_bandwidth": read / roofline.bandwidth if roofline and read is not None else None,
        "teraops_per_second": done / 1e12,
        "of_arithmetic": done / roofline.arithmetic if roofline else None,
    }


def decode_one_by_one(
    runner: Runner,
    tokens: Sequence[int],
    longest: int,
    progress: Callable[[list], Iterable] = iter,
) -> dict[str, Any]:
    """Decode given tokens one at a time, as GPTQ's and pyllama's `--benchmark` do.

    Args:
        tokens: decoded in sequences of up to `longest`, each into an empty cache.

    Returns:
        `tokens`, `seconds`: of each; `median`, percentiles (`p90`, `p99`) and `mean` of a token's
        time; `perplexity` of the tokens, each given those before it in its sequence, None where no
        sequence has a second one.
    """
    seconds, losses = [], []
    logits: Tensor | None = None
    for index in progress(list(range(len(tokens)))):
        token = torch.tensor(tokens[index : index + 1])
        if index % longest == 0:
            runner.begin(1, longest)
        elif logits is not None:
            losses.append(cross_entropy(logits.cpu(), token).item())
        elapsed, logits = timed(partial(runner.step, token))
        seconds.append(elapsed)
    times = torch.tensor(seconds, dtype=torch.float64)
    return {
        "tokens": len(tokens),
        "sequences": -(-len(tokens) // longest),
        "seconds": seconds,
        "mean": times.mean().item(),
        "median": statistics.median(seconds),
        **{f"p{share}": quantile(times, share / 100) for share in PERCENTILES},
        "perplexity": exp(math.fsum(losses) / len(losses)) if losses else None,
    }
