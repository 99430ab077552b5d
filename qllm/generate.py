"""Generation, with transformers' rules for where it ends and what it avoids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qllm.checkpoint.reader import read_json
from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.models import RawConfig
from qllm.parallel.pipeline import PipelineStage
from qllm.sampling import Sampler, Sampling
from qllm.stopping import cut, settled
from qllm.tokenizer import Tokenizer

# What transformers generates when nothing says how much.
DEFAULT_NEW_TOKENS = 20

# Settings of generation_config.json that would change greedy search and are not applied here, and
# the value, besides null, at which they do nothing.
NOT_APPLIED = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": {},
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "num_beams": 1,
    "stop_strings": [],
    "watermarking_config": None,
    "penalty_alpha": 0,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "num_return_sequences": 1,
    "max_time": None,
    "token_healing": False,
}


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


@dataclass(frozen=True)
class GenerationConfig:
    """How long to generate, and what to avoid; lengths count as transformers counts them.

    Attributes:
        max_new_tokens: how many tokens at the most; wins over max_length.
        max_length: the same, the longest prompt of the batch included.
        min_length: no end of text before this length, the longest prompt included.
        min_new_tokens: no end of text before this many new tokens; wins over min_length.
        eos_token_ids: each of them ends a text.
        repetition_penalty: divides positive logits of tokens seen so far, multiplies negative
            ones (Keskar et al. 2019).
        sampling: how tokens are drawn; None: the largest logit is taken.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    sampling: Sampling | None = None

    def new_tokens(self, longest: int) -> int:
        """How many tokens a batch may get whose longest prompt has `longest`."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is not None:
            return max(0, self.max_length - longest)
        return DEFAULT_NEW_TOKENS

    def min_tokens(self, longest: int) -> int:
        """How many tokens a batch whose longest prompt has `longest` gets before a text may end."""
        return self.min_new_tokens or self.min_length - longest


def read_sampling(folder: Path) -> Sampling:
    """How a checkpoint's generation_config.json would have tokens drawn.

    Raises:
        UserError: for values that are no numbers.
    """
    path = folder / "generation_config.json"
    return Sampling.read(RawConfig(read_json(path), str(path))) if path.exists() else Sampling()


def read_generation_config(
    folder: Path, config: ModelConfig, note: Callable[[str], None] = lambda line: None
) -> GenerationConfig:
    """The settings of a checkpoint: generation_config.json, else those that config.json has.

    Args:
        note: called with a line for settings that would change the result and are not applied.

    Raises:
        UserError: for values that cannot be.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        path = folder / "config.json"
    if not path.exists():
        return GenerationConfig(eos_token_ids=config.eos_token_ids)
    raw = RawConfig(read_json(path), str(path))
    ignored = [
        key for key, neutral in NOT_APPLIED.items() if raw.values.get(key) not in (None, neutral)
    ]
    if ignored:
        note(f"{path.name} sets {', '.join(ignored)}, which QLLM does not apply")
    lengths: dict[str, Any] = {
        key: raw.count(key)
        for key in ("max_new_tokens", "max_length", "min_length", "min_new_tokens")
        if raw.values.get(key) not in (None, 0)
    }
    return GenerationConfig(
        **lengths,
        eos_token_ids=raw.tokens("eos_token_id"),
        repetition_penalty=raw.number("repetition_penalty", 1.0),
    )


def generate(
    model: Generator,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_token: Callable[[int, int, bool], None] = lambda row, token, last: None,
    stop: Callable[[int, int], bool] | None = None,
) -> list[list[int]]:
    """Generate for a batch of prompts.

    Args:
        prompts: lists of token ids, none of them empty.
        on_token: called with the row and the id of each new token as it is found, and whether it
            is the row's last.
        stop: called with the row and the id of each new token, says whether it ends the row.

    Returns:
        The new ids of each prompt, up to and with its end of text.

    Raises:
        UserError: for an empty prompt, an id outside the vocabulary, or a prompt that leaves no
            room in the model's window for what is asked.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for row, token, last in generate_tokens(model, prompts, config, stop):
        results[row].append(token)
        on_token(row, token, last)
    return results


def generate_tokens(
    model: Generator,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop: Callable[[int, int], bool] | None = None,
) -> Iterator[tuple[int, int, bool]]:
    """The new tokens of `generate` as they are found: row, id, and whether it is the row's last.

    Raises:
        UserError: see `generate`.
    """
    check_prompts(model.config, prompts, config)
    longest = max(len(prompt) for prompt in prompts)
    count = config.new_tokens(longest)
    if count == 0:
        return
    whole = [range(len(prompts))]
    rows = whole if model.stage is None else model.stage.micro_batches(len(prompts))
    if config.sampling is not None:
        config = replace(config, sampling=config.sampling.with_seed())
    batches = [_Batch(model, run, prompts, config, stop) for run in rows]
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
        if rope is None or not rope.rereads:
            return False
        return max(map(len, self.texts)) == rope.original_max_positions + 1

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


class TextStream:
    """Writes each prompt's text as its tokens come, one prompt after the other.

    All prompts are generated at once; the text of a later one waits until those before it are
    finished.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        begin: Callable[[int], None],
        write: Callable[[str], None],
        stop: Sequence[str] = (),
    ) -> None:
        """
        Args:
            begin: called with a row before its text comes.
            write: called with each piece of text.
            stop: strings that a text ends in front of.
        """
        self.tokenizer, self.prompts, self.stop = tokenizer, prompts, stop
        self.begin, self.write = begin, write
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)
        self.row, self.written = 0, ""
        begin(0)

    def add(self, row: int, token: int, last: bool) -> None:
        """Take a new token in; what `generate` calls."""
        self.tokens[row].append(token)
        self.ended[row] = last
        while row == self.row:
            self._write()
            if not self.ended[row]:
                return
            self.row, self.written = row + 1, ""
            if self.row < len(self.prompts):
                # Its tokens so far have waited for this row to end.
                row = self.row
                self.begin(row)

    def _write(self) -> None:
        text = self.tokenizer.continuation(self.prompts[self.row], self.tokens[self.row])
        # A character whose bytes have not all come yet decodes to a replacement character.
        ready = text if self.ended[self.row] else settled(text.rstrip("\ufffd"), self.stop)
        ready = cut(ready, self.stop)
        if ready.startswith(self.written):
            self.write(ready[len(self.written) :])
            self.written = ready
