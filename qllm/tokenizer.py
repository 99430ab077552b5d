"""Text to token ids and back, by the `tokenizers` library, without importing transformers.

A folder with tokenizer.json is read as it is; OPT's own repositories have vocab.json and
merges.txt, which become the same byte-level BPE. Only a folder with nothing but
SentencePiece's tokenizer.model goes through transformers, which converts it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from qllm.checkpoint.reader import read_json
from qllm.errors import UserError
from qllm.files import check_file

SPECIAL = ("bos", "eos", "unk", "pad")


class _Codec(Protocol):
    def encode(self, text: str, max_length: int | None) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def largest_id(self) -> int: ...
    def id_of(self, token: str) -> int | None: ...


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        begin: the special token that stands for what comes before a text: the one named `bos`,
            else `eos`; None where tokenizer_config.json names neither.
    """

    def __init__(self, codec: _Codec, begin: int | None = None) -> None:
        self._codec, self.begin = codec, begin

    @classmethod
    def load(cls, folder: Path, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        Args:
            vocab_size: rows of the model's embedding, which no id may exceed.

        Raises:
            UserError: where there is none, it is broken, or its ids exceed the vocabulary.
        """
        codec = _load_codec(folder)
        if vocab_size is not None and codec.largest_id() >= vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has ids up to {codec.largest_id()}, the model's "
                f"vocabulary ends at {vocab_size - 1}; they do not belong together"
            )
        names = _special_tokens(folder)
        ids = (codec.id_of(names[kind]) for kind in ("bos", "eos") if kind in names)
        return cls(codec, next((token for token in ids if token is not None), None))

    @property
    def lead(self) -> int | None:
        """The special token that `encode` puts in front of every text; None where it puts none."""
        pair = zip(self.encode(""), self.encode("a"), strict=False)
        first, other = next(pair, (None, None))
        return first if first == other else None

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Token ids of a prompt, with the special tokens its model expects.

        Args:
            max_length: a longer prompt loses its beginning, but not its special tokens.
        """
        return self._codec.encode(text, max_length)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, without special tokens."""
        return self._codec.decode(ids)

    def continuation(self, prompt: list[int], ids: list[int]) -> str:
        """Text that `ids` add to a prompt; spaces between the two belong to it."""
        before = self.decode(prompt)
        whole = self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)


class _FastCodec:
    """The `tokenizers` library."""

    def __init__(self, tokenizer) -> None:  # noqa: ANN001 - tokenizers is imported late
        self._tokenizer = tokenizer
        tokenizer.no_padding()  # which the file may ask for

    def encode(self, text: str, max_length: int | None) -> list[int]:
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length, direction="left")
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def largest_id(self) -> int:
        # Not their number: a file may leave ids out.
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _SlowCodec:
    """transformers' own, for a SentencePiece model that has no tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(self, text: str, max_length: int | None) -> list[int]:
        self._tokenizer.truncation_side = "left"
        truncation = max_length is not None
        return self._tokenizer(text, truncation=truncation, max_length=max_length)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def largest_id(self) -> int:
        return max(self._tokenizer.get_vocab().values())

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.get_vocab().get(token)


def _load_codec(folder: Path) -> _FastCodec | _SlowCodec:
    from tokenizers import Tokenizer as FastTokenizer

    whole = folder / "tokenizer.json"
    try:
        if whole.exists():
            check_file(whole)
            return _FastCodec(FastTokenizer.from_file(str(whole)))
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            check_file(folder / "vocab.json")
            check_file(folder / "merges.txt")
            return _FastCodec(_byte_level_bpe(folder))
        if (folder / "tokenizer.model").exists():
            check_file(folder / "tokenizer.model")
            return _SlowCodec(folder)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from None
    raise UserError(
        f"{folder} has no tokenizer: neither tokenizer.json, vocab.json with merges.txt, "
        "nor tokenizer.model"
    )


def _byte_level_bpe(folder: Path):  # noqa: ANN202 - tokenizers is imported late
    """GPT-2's byte-level BPE, as OPT uses it: with `add_bos_token`, "</s>" begins every prompt."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as FastTokenizer

    settings = _settings(folder)
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = FastTokenizer(bpe)
    prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    names = _special_tokens(folder)
    special = list(dict.fromkeys(names.values()))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    bos = names.get("bos")
    if settings.get("add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _settings(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the special tokens that tokenizer_config.json names, by kind."""
    settings = _settings(folder)
    tokens = {kind: _content(settings.get(f"{kind}_token")) for kind in SPECIAL}
    return {kind: token for kind, token in tokens.items() if token is not None}


def _content(token: object) -> str | None:
    """The text of a special token, which tokenizer_config.json writes as a string or an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
