"""The classes of tokenizers that transformers has, built call by call as it builds them.

Each takes its vocabulary and merges from a folder's files; what else a file says, its normalizer
for one, counts where the class reads it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from qllm.files import parse_json, read_bytes, read_json
from qllm.tokenizer.special import NotDirectError, Token

# Of a tokenizer.json: those of 250,000 tokens have 15 MB to 35 MB.
MAX_BYTES = 256 << 20
UNKNOWN = "<unk>"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Marks are of a word, too.
QWEN3_5_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Any of these in a folder without tokenizer.json is what transformers reads.
OTHER_FORMATS = re.compile(r"tekken\.json|tokenizer\.model|tiktoken\.model|vocab_file|merges_file")


@dataclass(frozen=True)
class Files:
    """What a folder says of its tokenizer.

    Attributes:
        settings: tokenizer_config.json.
    """

    folder: Path
    settings: dict

    def optional(self, name: str) -> dict | None:
        """A JSON object, None where there is no such file."""
        path = self.folder / name
        return read_json(path) if path.exists() else None

    @cached_property
    def whole(self) -> bytes | None:
        """tokenizer.json."""
        path = self.folder / "tokenizer.json"
        return read_bytes(path, MAX_BYTES) if path.exists() else None

    @cached_property
    def parsed(self) -> dict:
        """tokenizer.json, of which transformers takes the vocabulary and the merges."""
        values = parse_json(self.whole or b"", str(self.folder / "tokenizer.json"))
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict) or model.get("type") != "BPE" or values.get("padding"):
            raise NotDirectError
        vocab, merges = model.get("vocab"), model.get("merges")
        if not isinstance(vocab, dict) or not isinstance(merges, list):
            raise NotDirectError
        return values

    def bpe(self, **options: object) -> models.BPE:
        model = self.parsed["model"]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        return models.BPE(model["vocab"], merges, **options)


def _as_the_file_says(files: Files) -> tokenizers.Tokenizer:
    """tokenizer.json as it is."""
    if files.whole is None:
        raise NotDirectError
    return tokenizers.Tokenizer.from_buffer(files.whole)


def _gpt2(files: Files) -> tokenizers.Tokenizer:
    """Byte-level BPE, from tokenizer.json or from vocab.json and merges.txt."""
    options = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    if files.whole is not None:
        model = files.bpe(**options)
    else:
        paths = [files.folder / name for name in ("vocab.json", "merges.txt")]
        listed = "\n".join(path.name for path in files.folder.iterdir())
        if not all(path.exists() for path in paths) or OTHER_FORMATS.search(listed):
            raise NotDirectError
        model = models.BPE.from_file(*map(str, paths), **options)
    tokenizer = tokenizers.Tokenizer(model)
    prefix_space = files.settings.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _llama(files: Files) -> tokenizers.Tokenizer:
    """BPE over text whose spaces are "▁", bytes where no token has a character."""
    if files.whole is None:
        raise NotDirectError
    tokenizer = tokenizers.Tokenizer(files.bpe(fuse_unk=True, byte_fallback=True))
    prefix_space = files.settings.get("add_prefix_space")
    prefix_space = prefix_space is None or prefix_space
    scheme = "always" if files.settings.get("legacy") else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=scheme if prefix_space else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(content=" ", left=1)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _byte_level(
    files: Files, *, words: str | None = None, digits: bool = False
) -> tokenizers.Tokenizer:
    """Byte-level BPE of normalized text, from tokenizer.json.

    Args:
        words: a pattern of what becomes tokens by itself; None is GPT-2's.
        digits: each becomes tokens by itself before that.
    """
    if files.whole is None:
        raise NotDirectError
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    tokenizer = tokenizers.Tokenizer(files.bpe(**empty))
    tokenizer.normalizer = normalizers.NFC()
    prefix_space = bool(files.settings.get("add_prefix_space"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=words is None)
    split: list[PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    split += [] if words is None else [pre_tokenizers.Split(Regex(words), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _content(token: object) -> object:
    """The text of a token, which files write with its flags as well."""
    return token.get("content") if isinstance(token, dict) else token


def _gemma(files: Files) -> tokenizers.Tokenizer:
    """BPE over text whose spaces are "▁", of which none is put in front."""
    if files.whole is None:
        raise NotDirectError
    said = (files.settings, files.optional("special_tokens_map.json") or {})
    named = [each["unk_token"] for each in said if "unk_token" in each]
    if any(_content(each) != UNKNOWN for each in named):
        raise NotDirectError
    model = files.bpe(fuse_unk=True, byte_fallback=True, unk_token=UNKNOWN)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@dataclass(frozen=True)
class TokenizerClass:
    """One of transformers' classes.

    Attributes:
        build: makes the tokenizer, without the tokens that are added to it.
        defaults: special tokens, by kind, that it has where no file names another.
    """

    build: Callable[[Files], tokenizers.Tokenizer]
    defaults: Mapping[str, Token | None]


BACKEND = TokenizerClass(_as_the_file_says, {})
TEXT_ENDS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
GPT2 = TokenizerClass(_gpt2, TEXT_ENDS)
GPT_NEOX = TokenizerClass(
    partial(_byte_level, words=None), TEXT_ENDS | {"pad_token": "<|padding|>"}
)
COHERE = TokenizerClass(
    partial(_byte_level, digits=True),
    {
        **{f"{kind}_token": f"<{kind.upper()}>" for kind in ("unk", "pad", "cls", "sep")},
        **{"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
        "mask_token": "<MASK_TOKEN>",
    },
)
QWEN2 = TokenizerClass(
    partial(_byte_level, words=QWEN2_WORDS),
    {**TEXT_ENDS, "bos_token": None, "pad_token": "<|endoftext|>"},
)
QWEN3_5 = TokenizerClass(partial(_byte_level, words=QWEN3_5_WORDS), QWEN2.defaults)
GEMMA = TokenizerClass(
    _gemma,
    {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "mask")}
    | {"unk_token": UNKNOWN},
)
LLAMA = TokenizerClass(_llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})

CLASSES = {
    "TokenizersBackend": BACKEND,
    "PreTrainedTokenizerFast": BACKEND,
    "BloomTokenizer": BACKEND,
    "BloomTokenizerFast": BACKEND,
    "GPT2Tokenizer": GPT2,
    "GPT2TokenizerFast": GPT2,
    "LlamaTokenizer": LLAMA,
    "LlamaTokenizerFast": LLAMA,
    "Qwen2Tokenizer": QWEN2,
    "Qwen2TokenizerFast": QWEN2,
    "Qwen3_5Tokenizer": QWEN3_5,
    "GemmaTokenizer": GEMMA,
    "GemmaTokenizerFast": GEMMA,
    "CohereTokenizer": COHERE,
    "CohereTokenizerFast": COHERE,
    "GPTNeoXTokenizer": GPT_NEOX,
    "GPTNeoXTokenizerFast": GPT_NEOX,
}
# By the model's type, where no file names one; a folder may lack config.json.
DEFAULT_CLASS = {
    "opt": GPT2,
    "gpt2": GPT2,
    "bloom": BACKEND,
    "llama": BACKEND,
    "mistral": BACKEND,
    "phi3": BACKEND,
    "qwen2": QWEN2,
    "qwen3": QWEN2,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": GPT_NEOX,
    "ministral3": BACKEND,
    "mistral3": BACKEND,
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN2,
    "qwen3_next": QWEN2,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
    "gemma3": GEMMA,
    "starcoder2": GPT2,
    "granite": BACKEND,
    "ernie4_5": BACKEND,
    "stablelm": BACKEND,
    "gemma": GEMMA,
    "olmo": GPT_NEOX,
    "phi": GPT2,
    "cohere": COHERE,
    "cohere2": COHERE,
    "glm": BACKEND,
    "glm4": BACKEND,
    "smollm3": BACKEND,
    "olmo2": BACKEND,
    "olmo3": BACKEND,
    None: BACKEND,
}
# Types whose files name classes that they are not of.
MISTRALS = ("mistral", "ministral3", "mistral3")
GLMS = ("glm", "glm4")
OWN_CLASS = (*MISTRALS, "phi3", "qwen2", "granite", "olmo2", "olmo3", *GLMS, "ernie4_5", "stablelm")
