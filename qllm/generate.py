"""Generation, with transformers' rules for where it ends and what it avoids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.generation_config import GenerationConfig
from qllm.parallel.pipeline import PipelineStage
from qllm.sampling import Sampler


class Generator(Protocol):
    """What generates: a `Decoder`, or an ONNX model of `qllm.onnx`; `Decoder` says how.

    Each takes the caches that its own `new_cache` makes.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def stage(self) -> PipelineStage | None: ...

    def new_cache(self, rows: int, capacity: int) -> Any: ...
    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: Any, *, share: bool = ...
    ) -> Tensor | None: ...
    def decode(self, tokens: Tensor, cache: Any, *, share: bool = ...) -> Tensor | None: ...


def generate(
    model: Generator,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_token: Callable[[int, int, bool], None] = lambda row, token, last: None,
    stop: Callable[[int, int], bool] | None = None,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Generate for prompts.

    Args:
        prompts: lists of token ids, none of them empty.
        on_token: called with the row and the id of each new token as it is found, and whether it
            is the row's last.
        stop: called with the row and the id of each new token, says whether it ends the row.
        batch_size: how many prompts there is memory for at once; None: all. What each gets is the
            same: lengths count as if all were in one batch.

    Returns:
        The new ids of each prompt, up to and with its end of text.

    Raises:
        UserError: for an empty prompt, an id outside the vocabulary, or a prompt that leaves no
            room in the model's window for what is asked.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for row, token, last in generate_tokens(model, prompts, config, stop, batch_size):
        results[row].append(token)
        on_token(row, token, last)
    return results


def generate_tokens(
    model: Generator,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop: Callable[[int, int], bool] | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """The new tokens of `generate` as they are found: row, id, and whether it is the row's last.

    Raises:
        UserError: see `generate`.
    """
    check_prompts(model.config, prompts, config)
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; give 1 or more, or None for all prompts")
    if config.new_tokens(max(len(prompt) for prompt in prompts)) == 0:
        return
    if config.sampling is not None:
        config = replace(config, sampling=config.sampling.with_seed())
    size = batch_size or len(prompts)
    for start in range(0, len(prompts), size):
        rows = range(start, min(start + size, len(prompts)))
        yield from _generate_rows(model, rows, prompts, config, stop)


def _generate_rows(
    model: Generator,
    rows: range,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop: Callable[[int, int], bool] | None,
) -> Iterator[tuple[int, int, bool]]:
    """The tokens of some of the prompts, which are generated together."""
    count = config.new_tokens(max(len(prompt) for prompt in prompts))
    runs = [rows]
    if model.stage is not None:
        runs = [rows[run.start : run.stop] for run in model.stage.micro_batches(len(rows))]
    batches = [_Batch(model, run, prompts, config, stop) for run in runs]
    for step in range(1, count + 1):
        for batch in batches:
            if batch.pending:
                yield from batch.take(False)
            if batch.live:
                batch.step()
                if model.stage is None:
                    yield from batch.take(step == count)
        if not any(batch.live for batch in batches):
            break
    for batch in batches:
        if batch.pending:
            yield from batch.take(True)


class _Batch:
    """Some of the prompts, which go through the model together, until each has ended.

    In a pipeline there are several, so that each stage has one to work on; a stage learns the new
    tokens of one when it comes to it again.

    Attributes:
        pending: a step was made whose tokens have not been taken.
        live: the prompts that have not ended, in the order of their tokens.
    """

    def __init__(
        self,
        model: Generator,
        rows: range,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        stop: Callable[[int, int], bool] | None,
    ) -> None:
        self.model, self.live, self.config, self.stop = model, list(rows), config, stop
        self.sampler: Sampler | None = None
        if config.sampling is not None:
            seeds = config.sampling.seeds(prompts)
            self.sampler = Sampler(config.sampling, [seeds[row] for row in rows])
        self.texts = [list(prompts[row]) for row in rows]
        longest = max(map(len, prompts))
        self.capacity = longest + config.new_tokens(longest)
        self.cache = model.new_cache(len(rows), self.capacity)
        self.processor = LogitsProcessor(model, self.texts, config, longest)
        self.tokens: Tensor | None = None
        self.pending = False

    def step(self) -> None:
        """Find the next token of each row."""
        if self.tokens is None:
            logits = self.model.prefill(self.texts, self.cache, share=False)
        elif self._is_to_be_read_anew():
            self.cache = self.model.new_cache(len(self.live), self.capacity)
            logits = self.model.prefill(self.texts, self.cache, share=False)
        else:
            logits = self.model.decode(self.tokens, self.cache, share=False)
        self.pending = True
        if logits is not None:
            logits = self.processor(logits)
            self.tokens = logits.argmax(dim=-1) if self.sampler is None else self.sampler(logits)
            if self.model.stage is not None:
                self.model.stage.broadcast(self.tokens)

    def _is_to_be_read_anew(self) -> bool:
        """Whether the longest text has just outgrown what its keys were made for."""
        rope = self.model.config.rope
        length = rope.reread_length if rope is not None else None
        return length is not None and max(map(len, self.texts)) == length + 1

    def take(self, last: bool) -> Iterator[tuple[int, int, bool]]:
        """The tokens that the last step found, of the rows that had not ended."""
        self.pending = False
        stage = self.model.stage
        if stage is not None and not stage.last:
            received = torch.empty(len(self.live), dtype=torch.int64, device=self.model.device)
            self.tokens = stage.broadcast(received)
        assert self.tokens is not None  # the last stage has found them
        self.processor.add(self.tokens)
        found = self.tokens.tolist()
        for text, token in zip(self.texts, found, strict=True):
            text.append(token)
        ended = [last or token in self.config.eos_token_ids for token in found]
        if self.stop is not None:
            pairs = zip(self.live, found, ended, strict=True)
            ended = [self.stop(row, token) or over for row, token, over in pairs]
        rows = list(zip(self.live, found, ended, strict=True))
        if any(ended):
            self._keep([i for i, over in enumerate(ended) if not over])
        yield from rows

    def _keep(self, indices: list[int]) -> None:
        """Let all prompts go but those at these places, so that the others cost nothing more."""
        self.live = [self.live[i] for i in indices]
        self.texts = [self.texts[i] for i in indices]
        self.cache.keep(indices)
        self.processor.keep(indices)
        if self.sampler is not None:
            self.sampler.keep(indices)
        if self.tokens is not None:
            self.tokens = self.tokens[torch.tensor(indices, dtype=torch.int64)]


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], generation: GenerationConfig
) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
        UserError: see `generate`.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UserError(f"prompt {number} is empty; give at least one token")
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise UserError(
                f"prompt {number} has the token id {wrong[0]}; "
                f"the model's vocabulary ends at {config.vocab_size - 1}"
            )
    longest = max(len(prompt) for prompt in prompts)
    count = generation.new_tokens(longest)
    if generation.max_new_tokens is None and count == 0:
        raise UserError(
            f"a prompt of {longest} tokens leaves nothing to generate: max_length, which counts "
            f"it, is {generation.max_length}"
        )
    window = config.max_positions
    if window is not None and longest + count > window:
        raise UserError(
            f"a prompt of {longest} tokens and {count} new ones exceed the model's window of "
            f"{window}; lower --max-prompt-length or --max-gen-tokens"
        )


class LogitsProcessor:
    """What transformers' processors do to the logits of greedy search, in their order."""

    def __init__(
        self,
        model: Generator,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        longest: int | None = None,
    ) -> None:
        """
        Args:
            longest: tokens of the longest prompt of the batch that these are part of.
        """
        self.config = config
        longest = max(len(prompt) for prompt in prompts) if longest is None else longest
        self.min_tokens = config.min_tokens(longest)
        self.generated = 0
        # Checkpoints name ids that no token has, such as -1 for none.
        eos = [token for token in config.eos_token_ids if 0 <= token < model.config.vocab_size]
        self.eos = torch.tensor(eos, dtype=torch.int64, device=model.device)
        self.seen: Tensor | None = None
        if config.repetition_penalty != 1.0:
            size = (len(prompts), model.config.vocab_size)
            self.seen = torch.zeros(size, dtype=torch.bool, device=model.device)
            for row, prompt in enumerate(prompts):
                self.seen[row, list(prompt)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits (B, V) of the next token, as greedy search may choose from them."""
        if self.seen is not None:
            penalty = self.config.repetition_penalty
            punished = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen, punished, logits)
        if self.generated < self.min_tokens and len(self.eos):
            logits = logits.index_fill(1, self.eos, -math.inf)
        return logits

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with the prompts at these places alone."""
        if self.seen is not None:
            self.seen = self.seen[list(indices)]

    def add(self, tokens: Tensor) -> None:
        """Take note of the tokens (B,) that were chosen."""
        self.generated += 1
        if self.seen is not None:
            self.seen[torch.arange(len(tokens), device=tokens.device), tokens] = True
