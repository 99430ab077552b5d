"""CTranslate2 in int8: weights with a scale per output channel, x rounded with one per token.

The weights are those of a checkpoint with random weights, taken through CTranslate2's own loader of
the architecture, its tokens named by their ids. Its steps are those of greedy generation, which is
all that its interface has: a prompt's prefill is the generation of one token. Products are those
of its default for the CPU: oneDNN's where that is not Intel's. What is not quantized is float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import Converter
from ctranslate2.converters import transformers as loaders
from ctranslate2.specs import ModelSpec

from benchmarks.rivals.common import (
    PREFILL_RUNS,
    Model,
    checkpoint,
    published,
    random_prompts,
)
from qllm.huggingface import load_reference
from qllm.ops.cpu.limits import median_seconds

if TYPE_CHECKING:
    from benchmarks.rivals.interleaved import Settings

LOADERS = {
    "opt": loaders.OPTLoader,
    "bloom": loaders.BloomLoader,
    "llama": loaders.LlamaLoader,
}


class CheckpointConverter(Converter):
    """Converts a checkpoint that needs no tokenizer: a token's text is its id."""

    def __init__(self, path: Path, config: dict) -> None:
        self.path, self.config = path, config

    def _load(self) -> ModelSpec:
        tokenizer = SimpleNamespace(
            get_vocab=lambda: {str(token): token for token in range(self.config["vocab_size"])},
            bos_token=str(self.config["bos_token_id"]),
            eos_token=str(self.config["eos_token_id"]),
            unk_token="0",
        )
        model = load_reference(self.path, dtype=torch.float32)
        with torch.no_grad():
            return LOADERS[self.config["model_type"]]()(model, tokenizer)


def models(repository: str, settings: Settings, folder: Path, stack: ExitStack) -> Iterator[Model]:
    """The one model.

    Args:
        folder: for the checkpoint and what it is converted to, which stay.
        stack: has nothing to free.
    """
    if not settings.wants("8:tc-li"):
        return
    config = published(repository, settings)
    target = folder / "ctranslate2"
    converter = CheckpointConverter(checkpoint(folder, repository, settings), config)
    converter.convert(str(target), quantization="int8", force=True)
    generator = ctranslate2.Generator(
        str(target),
        device="cpu",
        compute_type="int8",
        inter_threads=1,
        intra_threads=settings.threads,
    )

    def generate(prompts: np.ndarray, count: int) -> list[float]:
        """When each of `count` tokens of the first prompt was there."""
        times = []

        def note(step: ctranslate2.GenerationStepResult) -> bool:
            if step.batch_id == 0:
                times.append(time.perf_counter())
            return False

        generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=count,
            min_length=count,
            include_prompt_in_result=False,
            callback=note,
        )
        return times

    def prefill(tokens: int) -> float:
        prompt = random_prompts(1, tokens, config["vocab_size"])
        return median_seconds(lambda: generate(prompt, 1), PREFILL_RUNS)

    def decode(batch: int, context: int, steps: int) -> float:
        # The first token comes with the prompt's end; the step after it warms up.
        times = generate(random_prompts(batch, context, config["vocab_size"]), steps + 2)
        return statistics.median(np.diff(times)[1:])

    size = (target / "model.bin").stat().st_size
    yield Model("ctranslate2 int8", "8:tc-li", size, prefill, decode)
