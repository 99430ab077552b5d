"""A tokenizer of what a file's metadata say, by the `tokenizers` library: the ids are llama.cpp's.

Two kinds: "gpt2", byte-level BPE with a pre-tokenizer that has a name, and "llama", SentencePiece's
BPE, whose merges follow from the tokens' scores.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qllm.errors import UserError
from qllm.gguf.config import CONTROL, named_ends
from qllm.gguf.file import read_gguf
from qllm.gguf.metadata import Metadata

# Of tokenizer.ggml.token_type.
UNKNOWN, USER_DEFINED, BYTE = 2, 4, 6
CHAT_TEMPLATE = "tokenizer.chat_template"
DEFAULT_TEMPLATE = "default"  # of several, the one that a conversation takes
NAME = "general.name"
# In a file whose name says that it is Phi-3, all tokens that are cut out of a text but these take
# the spaces behind them along, as in llama.cpp: no key says it.
PHI3, PHI3_KEEPS_SPACES = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")
LONGEST_TOKEN = 4096  # in characters: each may be where it is cut in two

ENGLISH = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
# Marks are of a word, too.
QWEN3_5 = (
    ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
# Words of capital and of small letters, as o200k (gpt-oss) and Mistral's Tekken cut them.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*")]
SLASHES = REST.replace(r"[\r\n]*", r"[\r\n/]*")
O200K = "|".join(f"{word}{ENGLISH}?" for word in CASED) + r"|\p{N}{1,3}" + SLASHES
TEKKEN = "|".join(CASED) + r"|\p{N}" + SLASHES
SEED = ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
DIGIT = r"\p{N}"
# Patterns by which a text is cut, one after the other, by tokenizer.ggml.pre.
PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("glm4", "chatglm-bpe"), (LLAMA3,)),
    "qwen35": (QWEN3_5,),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"), (QWEN2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (DIGIT, GPT2)),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "exaone4"), (GPT2,)),
    **dict.fromkeys(("bloom", "gpt3-finnish"), (BLOOM,)),
    **{"gpt-4o": (O200K,), "tekken": (TEKKEN,), "seed-coder": (SEED,)},
}
# Of these, a word that is a token is that token, whatever its merges; and BOS comes first.
IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


class GGUFCodec:
    """The tokenizer of a file.

    Attributes:
        prefix_token_id: the id of BOS, or else of EOS; None where the file names neither.
    """

    def __init__(self, metadata: Metadata) -> None:
        """
        Raises:
            UserError: for a file without a tokenizer, or with one of another kind.
        """
        key = "tokenizer.ggml."
        kind = metadata.text(f"{key}model", "none")
        if kind not in KINDS:
            said = "has no tokenizer" if kind in ("none", "no_vocab") else f"has a {kind!r} one"
            raise UserError(
                f"{metadata.where} {said}; QLLM reads the tokenizers {' and '.join(KINDS)} of "
                "GGUF files"
            )
        self.tokens = metadata.texts(f"{key}tokens")
        types = [*metadata.numbers(f"{key}token_type", [1] * len(self.tokens))]
        twice = [text for text, count in Counter(self.tokens).items() if count > 1]
        if len(types) != len(self.tokens) or twice or not self.tokens:
            raise UserError(
                f"{metadata.where} has {len(self.tokens)} tokens, and types of {len(types)}"
                + (f"; {twice[0]!r} is there more than once" if twice else "")
            )
        for i in named_ends(self.tokens, types):
            types[i] = CONTROL
        found = {name: self._special(metadata, f"{key}{name}_token_id") for name in ("bos", "eos")}
        self._named = {name: i for name, i in found.items() if i is not None}
        bos, eos = found.values()
        self.prefix_token_id = eos if bos is None else bos
        pre = metadata.text(f"{key}pre", "")
        ahead = metadata.flag(f"{key}add_bos_token", kind == "llama" or pre in IGNORE_MERGES)
        behind = metadata.flag(f"{key}add_eos_token", False)
        self._first = [bos] if ahead and bos is not None else []
        self._last = [eos] if behind and eos is not None else []
        self._tokenizer = KINDS[kind](metadata, self.tokens, types)
        name = str(metadata.values.get(NAME, "")).lower()
        strips = any(part in name for part in PHI3)
        self._tokenizer.add_tokens(
            [
                AddedToken(
                    text,
                    normalized=False,
                    special=number != USER_DEFINED,
                    rstrip=strips and text not in PHI3_KEEPS_SPACES,
                )
                for text, number in zip(self.tokens, types, strict=True)
                if number in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )

    def _special(self, metadata: Metadata, key: str) -> int | None:
        """The id of a special token; none where it is beyond the vocabulary, as in llama.cpp."""
        number = metadata.count(key, -1)
        return number if 0 <= number < len(self.tokens) else None

    def encode(self, text: str, max_length: int | None) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if max_length is not None:
            max_tokens = max(0, max_length - len(self._first) - len(self._last))
            ids = ids[max(0, len(ids) - max_tokens) :]
        return [*self._first, *ids, *self._last]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token(self, number: int) -> str | None:
        return self._tokenizer.id_to_token(number)

    def definition(self) -> str:
        return self._tokenizer.to_str()

    def files(self, metadata: Metadata) -> dict[str, str]:
        """tokenizer.json and tokenizer_config.json of the same tokenizer."""
        saved = json.loads(self._tokenizer.to_str())
        special = {self.tokens[i]: i for i in (*self._first, *self._last)}
        if special:
            whole = {"Sequence": {"id": "A", "type_id": 0}}
            names = [[self.tokens[i] for i in ids] for ids in (self._first, self._last)]
            first, last = ([{"SpecialToken": {"id": n, "type_id": 0}} for n in ns] for ns in names)
            saved["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [*first, whole, *last],
                "pair": [*first, whole, {"Sequence": {"id": "B", "type_id": 1}}, *last],
                "special_tokens": {
                    text: {"id": text, "ids": [i], "tokens": [text]} for text, i in special.items()
                },
            }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": self.tokens[i] for name, i in self._named.items()},
        }
        named = {
            key.removeprefix(CHAT_TEMPLATE).removeprefix(".") or DEFAULT_TEMPLATE: metadata.text(
                key
            )
            for key in metadata.values
            if key == CHAT_TEMPLATE or key.startswith(f"{CHAT_TEMPLATE}.")
        }
        if list(named) == [DEFAULT_TEMPLATE]:
            settings["chat_template"] = named[DEFAULT_TEMPLATE]
        elif named:
            listed = [{"name": name, "template": text} for name, text in named.items()]
            settings["chat_template"] = listed
        return {
            "tokenizer.json": json.dumps(saved, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
        }


def tokenizer_files(path: Path) -> dict[str, str]:
    """What a checkpoint folder with the tokenizer of a file has, by name.

    Raises:
        UserError: see `GGUFCodec`.
    """
    metadata = Metadata(read_gguf(path))
    return GGUFCodec(metadata).files(metadata)


def load(path: Path) -> GGUFCodec:
    """The tokenizer of a file.

    Raises:
        UserError: see `GGUFCodec`.
    """
    return GGUFCodec(Metadata(read_gguf(path)))


def _byte_level(metadata: Metadata, tokens: list[str], types: list) -> tokenizers.Tokenizer:
    """BPE over bytes, in words that a pattern cuts."""
    pre = metadata.text("tokenizer.ggml.pre", "")
    if pre not in PATTERNS:
        raise UserError(
            f"{metadata.where} cuts its texts by {pre or 'default'!r} (tokenizer.ggml.pre), which "
            f"QLLM does not know; it knows {', '.join(PATTERNS)}"
        )
    listed = metadata.texts("tokenizer.ggml.merges")
    merges: Any = [tuple(t.split(" ")) if t.count(" ") == 1 else _pair(t) for t in listed]
    vocabulary = {text: i for i, text in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=pre in IGNORE_MERGES)
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, whole])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """Two tokens with a space in between; the first may itself begin with one."""
    at = max(merge.find(" ", 1), 0)
    return merge[:at], merge[at + 1 :]


def _sentencepiece(metadata: Metadata, tokens: list[str], types: list) -> tokenizers.Tokenizer:
    """BPE over text whose spaces are "▁", bytes where no token has a character.

    Of two neighbours that are a token together, those with the highest score are joined first; a
    merge is any pair that makes a token.
    """
    scores = metadata.numbers("tokenizer.ggml.scores", [0.0] * len(tokens))
    if len(scores) != len(tokens):
        raise UserError(f"{metadata.where} has {len(tokens)} tokens, and scores of {len(scores)}")
    long = [text for text in tokens if len(text) > LONGEST_TOKEN]
    if long:
        raise UserError(f"{metadata.where} has a token of {len(long[0])} characters")
    vocabulary = {text: i for i, text in enumerate(tokens)}
    merges = merges_of(tokens, types, scores)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True)
    )
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ends += [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def merges_of(
    tokens: Sequence[str], types: Sequence[float], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Of SentencePiece's BPE: all pairs of tokens that are one together, highest scores first."""
    vocabulary = {text: i for i, text in enumerate(tokens)}
    special = {i for i, number in enumerate(types) if number in (UNKNOWN, CONTROL, BYTE)}
    order = sorted((-scores[i], i) for i in range(len(tokens)) if i not in special)
    merges = []
    for _, i in order:
        text = tokens[i]
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
