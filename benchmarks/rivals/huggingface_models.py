"""transformers in bfloat16, with its own cache and attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.rivals.common import PREFILL_RUNS, Model, checkpoint, random_prompts
from qllm.huggingface import load_reference
from qllm.ops.cpu.limits import median_seconds

if TYPE_CHECKING:
    from benchmarks.rivals.interleaved import Settings


def models(repository: str, settings: Settings, folder: Path, stack: ExitStack) -> Iterator[Model]:
    """The one model.

    Args:
        folder: for the checkpoint, which stays.
        stack: has nothing to free.
    """
    if not settings.wants("16"):
        return
    torch.set_num_threads(settings.threads)
    model = load_reference(checkpoint(folder, repository, settings), dtype=torch.bfloat16)
    vocab = model.config.vocab_size

    @torch.inference_mode()
    def prefill(tokens: int) -> float:
        prompt = torch.from_numpy(random_prompts(1, tokens, vocab))
        return median_seconds(lambda: model(prompt, logits_to_keep=1), PREFILL_RUNS)

    @torch.inference_mode()
    def decode(batch: int, context: int, steps: int) -> float:
        prompts = torch.from_numpy(random_prompts(batch, context, vocab))
        out = model(prompts, use_cache=True, logits_to_keep=1)

        def step() -> None:
            nonlocal out
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

        return median_seconds(step, steps)

    size = model.get_memory_footprint()
    yield Model("transformers bfloat16", "16", size, prefill, decode)
