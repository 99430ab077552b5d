"""Generation, with transformers' rules for where it ends and what it avoids."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Protocol

import torch
from torch import Tensor

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.generation_config import GenerationConfig
from qllm.parallel.pipeline import PipelineStage
from qllm.sampling import Sampler

FIRST_STEPS = 3  # a prompt's, one whose kernels are compiled, and one that is captured


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
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise UserError(f"batch_size is {batch_size!r}; give 1 or more, or None for all prompts")
    if config.new_tokens(max(len(prompt) for prompt in prompts)) == 0:
        return
    if config.sampling is not None:
        config = replace(config, sampling=config.sampling.with_seed())
    size = int(batch_size or len(prompts))
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
    for _ in range(count):
        for batch in batches:
            if model.stage is not None:
                yield from batch.take()
            if batch.live:
                batch.step()
            if model.stage is None:
                yield from batch.take(batch.in_flight)
        if not any(batch.live for batch in batches):
            break
    for batch in batches:
        yield from batch.take()


class NewTokens:
    """Tokens (B,) that a step finds, on their way to the CPU: a GPU's are there once it has ended.

    Reading the tensor itself would wait for whatever was launched since.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._copied = tokens, None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tolist(self) -> list[int]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tokens.tolist()


class _Batch:
    """Some of the prompts, which go through the model together, until each has ended.

    In a pipeline there are several, so that each stage has one to work on; a stage learns the new
    tokens of one when it comes to it again. A GPU is given the next step while it computes one, so
    that it does not wait for what Python does in between.

    Attributes:
        live: the prompts that have not ended, in the order of their tokens.
        texts: of each prompt, with the tokens that have been taken.
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
        self.texts = {row: list(prompts[row]) for row in rows}
        longest = max(map(len, prompts))
        self.count = config.new_tokens(longest)
        self.capacity = longest + self.count
        self.cache = model.new_cache(len(rows), self.capacity)
        self.processor = LogitsProcessor(model, list(self.texts.values()), config, longest)
        self.tokens: Tensor | None = None
        self.made = self.taken = 0  # steps
        # Of steps whose tokens have not been taken: those that were live, and what was found.
        self.found: deque[tuple[list[int], NewTokens | None]] = deque()

    @property
    def in_flight(self) -> int:
        """Steps that may be launched before their tokens are known.

        The first ones are waited for: they compile, or are captured.
        """
        ahead = computes_ahead(self.model.device) and self.made > FIRST_STEPS
        alone = self.sampler is None and self._reread_length is None
        return int(ahead and alone and self.made < self.count)

    def step(self) -> None:
        """Find the next token of each row."""
        if self.tokens is None:
            logits = self._read()
        elif self._is_to_be_read_anew():
            self.cache = self.model.new_cache(len(self.live), self.capacity)
            logits = self._read()
        else:
            logits = self.model.decode(self.tokens, self.cache, share=False)
        self.made += 1
        found = None
        if logits is not None:
            logits = self.processor(logits)
            self.tokens = logits.argmax(dim=-1) if self.sampler is None else self.sampler(logits)
            self.processor.add(self.tokens)
            found = NewTokens(self.tokens)
            if self.model.stage is not None:
                self.model.stage.broadcast(self.tokens)
        self.found.append((self.live, found))

    def _read(self) -> Tensor | None:
        """Run the texts: logits of what follows on them."""
        texts = [self.texts[row] for row in self.live]
        return self.model.prefill(texts, self.cache, share=False)

    @property
    def _reread_length(self) -> int | None:
        rope = self.model.config.rope
        return rope.reread_length if rope is not None else None

    def _is_to_be_read_anew(self) -> bool:
        """Whether a text has just outgrown what its keys were made for.

        The others are read anew with it, which gives them the keys that they had.
        """
        length = self._reread_length
        return length is not None and length + 1 in (len(self.texts[i]) for i in self.live)

    def take(self, left: int = 0) -> Iterator[tuple[int, int, bool]]:
        """The tokens that steps found, but the last ones, of the rows that had not ended."""
        while len(self.found) > left:
            rows, found = self.found.popleft()
            if found is None:  # by another stage
                stage = self.model.stage
                assert stage is not None
                received = torch.empty(len(rows), dtype=torch.int64, device=self.model.device)
                self.tokens = stage.broadcast(received)
                found = NewTokens(self.tokens)
            self.taken += 1
            new = []
            for row, token in zip(rows, found.tolist(), strict=True):
                if row not in self.live:  # it ended while this step was in flight
                    continue
                self.texts[row].append(token)
                over = self.taken == self.count or token in self.config.eos_token_ids
                # It is to see every token.
                over = (self.stop is not None and self.stop(row, token)) or over
                new.append((row, token, over))
            if any(over for _, _, over in new):
                self._keep([i for i, (_, _, over) in enumerate(new) if not over])
            yield from new

    def _keep(self, indices: list[int]) -> None:
        """Let all prompts go but those at these places, so that the others cost nothing more."""
        self.live = [self.live[i] for i in indices]
        self.cache.keep(indices)
        self.processor.keep(indices)
        if self.sampler is not None:
            self.sampler.keep(indices)
        if self.tokens is not None:
            self.tokens = self.tokens[torch.tensor(indices, dtype=torch.int64)]
        if not self.live:
            self.found.clear()


def computes_ahead(device: torch.device) -> bool:
    """Whether a device computes what it was given while Python goes on."""
    return device.type == "cuda"


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
            f"{window}; lower `max_prompt_length` or `max_new_tokens`"
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
