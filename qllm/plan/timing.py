"""Prompts and steps of a model, timed as users run them: by `generate`, its own work included."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import Decoder
from qllm.plan.shape import Workload

REPEATS = 5
UNCOUNTED = 2  # steps behind a prompt: what they do is captured for those that follow


def undisturbed(times: Sequence[float]) -> float:
    """The lower quartile of some measurements: a shared machine is slow for seconds at a time.

    What others do to it next no plan can know; the fastest of all would be luck.
    """
    return float(np.quantile(times, 0.25))


def time_generation(model: Decoder, work: Workload, repeats: int = REPEATS) -> tuple[float, float]:
    """Run random prompts; of a model in stages, in the process of each at once.

    Returns:
        seconds of the prompts' pass, and of one of the steps behind it (of a run the median);
        `undisturbed` of the repeats. Where the window has no place for a step that counts, the
        prompts are shorter by up to 3 tokens.
    """
    draw = torch.Generator().manual_seed(0)
    new = max(work.new, UNCOUNTED + 2)  # the first one is the prompt's
    window = model.config.max_positions
    length = work.prompt if window is None else min(work.prompt, window - new)
    size = (work.batch, length)
    prompts = torch.randint(model.config.vocab_size, size, generator=draw).tolist()
    asked = GenerationConfig(max_new_tokens=new)
    runs = np.array([_passes(model, prompts, asked) for _ in range(repeats)])
    steps = np.median(runs[:, 1 + UNCOUNTED :], axis=1)
    return undisturbed(runs[:, 0].tolist()), undisturbed(steps.tolist())


def _passes(
    model: Decoder, prompts: Sequence[Sequence[int]], asked: GenerationConfig
) -> list[float]:
    """Seconds of the first pass and of each step."""
    times = [time.perf_counter()]
    generate(model, prompts, asked, lambda *token: times.append(time.perf_counter()))
    # Rows get their tokens together: a pass ends with the last row's.
    return list(np.diff(times[:: len(prompts)]))
