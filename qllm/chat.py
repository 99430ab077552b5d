"""A conversation with a model: its chat template, and a cache that stays between turns."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from qllm.config import ModelConfig
from qllm.errors import UserError, first_line
from qllm.files import read_json
from qllm.generate import LogitsProcessor
from qllm.generation_config import GenerationConfig
from qllm.gguf import is_gguf
from qllm.gguf.file import read_gguf
from qllm.gguf.metadata import Metadata
from qllm.gguf.tokenizer import CHAT_TEMPLATE, DEFAULT_TEMPLATE
from qllm.llm import LLM
from qllm.sampling import Sampler
from qllm.stopping import StopStrings
from qllm.stream import TextStream
from qllm.text import surrogate
from qllm.tokenizer.templates import read_templates

# Tokens of a conversation that are remembered at the most, unless more are asked for.
DEFAULT_CONTEXT = 8192
# A message that no template has in itself.
PROBE = "d6f1c7a0"
LONGEST_TEMPLATE = 1 << 20


class ChatTemplate:
    """A chat template, run in jinja2's sandbox as transformers does.

    Attributes:
        where: the file it is from, for messages.
    """

    def __init__(self, source: str, tokens: dict[str, str], where: str) -> None:
        """
        Args:
            tokens: "bos_token" and the like, to their texts.

        Raises:
            UserError: for what is no template.
        """
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """Marks what a model said, for training: here it is the text that it marks."""

            tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        self.where, self._tokens = where, tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            if len(source) > LONGEST_TEMPLATE:
                _refuse(f"it has {len(source)} characters")
            self._template = environment.from_string(source)
        except Exception as error:
            raise UserError(f"{where}: its chat template is none ({first_line(error)})") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """The template of a checkpoint folder, or of a GGUF file.

        Raises:
            UserError: where there is none.
        """
        if is_gguf(folder):
            found = Metadata(read_gguf(folder))
            source: Any = found.text(CHAT_TEMPLATE, "")
            listed = found.texts("tokenizer.ggml.tokens", [])
            ids = {k: found.count(f"tokenizer.ggml.{k}_token_id", -1) for k in ("bos", "eos")}
            tokens = {f"{k}_token": listed[i] for k, i in ids.items() if 0 <= i < len(listed)}
        else:
            path = folder / "tokenizer_config.json"
            settings = read_json(path) if path.exists() else {}
            source = read_templates(folder).get(DEFAULT_TEMPLATE, "")
            values = {key: settings.get(key) for key in ("bos_token", "eos_token")}
            values = {k: v.get("content") if isinstance(v, dict) else v for k, v in values.items()}
            tokens = {key: value for key, value in values.items() if isinstance(value, str)}
        if not isinstance(source, str) or not source:
            raise UserError(
                f"{folder} has no chat template; qllm_gen.py continues texts without one"
            )
        return cls(source, tokens, str(folder))

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation, up to where an answer begins.

        Raises:
            UserError: for a template that fails, or asks for what a template may not.
        """
        return self._render(_in_parts(messages) if self._takes_parts else messages)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether it knows messages in parts alone, as those of models that take images may.

        Of others it leaves out what is said, or fails.
        """
        messages = [{"role": "user", "content": PROBE}]
        return not self._shows(messages) and self._shows(_in_parts(messages))

    def _shows(self, messages: Sequence[Mapping[str, object]]) -> bool:
        """Whether a rendered text has PROBE in it."""
        try:
            return PROBE in self._render(messages)
        except UserError:
            return False

    def _render(self, messages: Sequence[Mapping[str, object]]) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=None,  # templates tell None from what is not defined
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except Exception as error:  # a template raises whatever it likes
            raise UserError(
                f"{self.where}: its chat template fails ({first_line(error)})"
            ) from None


def _in_parts(messages: Sequence[Mapping[str, str]]) -> list[dict[str, object]]:
    """Messages, each of which is a list of one part."""
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def context_size(config: ModelConfig, asked: int | None = None) -> int:
    """Tokens that a conversation has memory for.

    Raises:
        UserError: more than the model's window are asked for.
    """
    window = config.max_positions
    if asked is None:
        return min(window or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if window is not None and asked > window:
        raise UserError(f"a context of {asked} tokens exceeds the model's window of {window}")
    return asked


class Chat:
    """A conversation.

    Attributes:
        messages: what was said, as templates take it; of the oldest turns none that would not fit.
    """

    def __init__(
        self,
        llm: LLM,
        template: ChatTemplate,
        config: GenerationConfig,
        *,
        system: str | None = None,
        stop: Sequence[str] = (),
        context: int | None = None,
    ) -> None:
        """
        Args:
            system: the message in front of all others.
            stop: strings that end an answer.
            context: tokens that the cache has memory for, see `context_size`.

        Raises:
            UserError: for a context that the model, or memory, does not have.
        """
        self.llm, self.template, self.config, self.stop = llm, template, config, list(stop)
        self.context = context_size(llm.config, context)
        self._system = [{"role": "system", "content": system}] if system else []
        self._cache = llm.model.new_cache(1, self.context)
        self._read: list[int] = []  # tokens whose keys and values the cache has
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = list(self._system)

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer to a message; one that is not waited for until its end counts too.

        Raises:
            UserError: for a message that is no text, or does not fit the context, or a template
                that fails; it is then forgotten.
        """
        if surrogate(text) is not None:  # as which Python reads bytes that are none
            raise UserError("the message is not UTF-8 text")
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fit()
        except BaseException:  # Ctrl-C, too
            self.messages = before
            raise
        pieces: list[str] = []
        try:
            for piece in self._generate(ids):
                pieces.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _fit(self) -> list[int]:
        """Token ids of the conversation, without its oldest turns where they are too many."""
        max_tokens = self.context - 1
        # Of a long answer to come the conversation keeps half of the context.
        wanted = min(self.config.max_new_tokens or 1, self.context // 2)
        while True:
            ids = self._encode(self.template.render(self.messages))
            turns = len(self.messages) - len(self._system)
            if len(ids) + wanted <= self.context or (turns == 1 and len(ids) <= max_tokens):
                return ids
            if turns == 1:
                raise UserError(
                    f"the message has {len(ids)} tokens with the template's, and the context "
                    f"{self.context}; write a shorter one"
                )
            first = len(self._system)
            del self.messages[first : first + 2]

    def _encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, which has its special tokens itself."""
        return self.llm.tokenizer.encode_open(text)[len(self.llm.tokenizer.prefix) :]

    def _generate(self, ids: list[int]) -> Iterator[str]:
        """Pieces of what follows; what the cache has of the tokens is not read again."""
        model: Any = self.llm.model  # a cache of its own, and logits: all layers are here
        cache: Any = self._cache
        config = self.llm.config
        limit = config.rope.reread_length if config.rope is not None else None
        # Keys of longer texts are others, as in `generate`.
        unchanged = config.unchanged_length
        same = 0
        while same < min(len(self._read), len(ids) - 1) and self._read[same] == ids[same]:
            same += 1
        lengths = len(self._read), len(ids)
        if unchanged is not None and max(lengths) > unchanged:
            all_beyond = limit is not None and min(lengths) > limit
            same = same if all_beyond else 0
        same = cache.rewind(0, same)
        self._read = list(ids[:same])
        pieces: list[str] = []
        stream = TextStream(self.llm.tokenizer, [ids], lambda row: None, pieces.append, self.stop)
        stops = StopStrings(self.llm.tokenizer, [ids], self.stop) if self.stop else None
        processor = LogitsProcessor(model, [ids], self.config)
        sampler = None
        if self.config.sampling is not None:
            sampling = self.config.sampling.with_seed()
            sampler = Sampler(sampling, sampling.seeds([ids]))
        logits = model.prefill([ids[same:]], cache)
        self._read = list(ids)
        left = min(self.config.max_new_tokens or self.context, self.context - len(ids))
        for number in range(left):
            logits = processor(logits)
            tokens = logits.argmax(dim=-1) if sampler is None else sampler(logits)
            processor.add(tokens)
            token = int(tokens)
            last = token in self.config.eos_token_ids or number == left - 1
            last = (stops is not None and stops(0, token)) or last
            stream.add(0, token, last)
            yield from pieces
            pieces.clear()
            if last:
                return
            self._read.append(token)
            if len(self._read) - 1 == limit:
                cache.rewind(0, 0)
                logits = model.prefill([self._read], cache)
            else:
                logits = model.decode(torch.tensor([token], device=model.device), cache)
