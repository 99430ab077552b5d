"""A tokenizer by the `tokenizers` library alone, where its files are of the common kinds.

transformers' AutoTokenizer is what decides a tokenizer's ids, and takes a second to import. What it
does with the classes and the settings below is done here, call by call; where a folder says
anything else, `load` says so, and transformers itself is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from types import NoneType

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from qllm.files import parse_json, read_bytes, read_json
from qllm.tokenizer.special import LISTS, NAMED, NotDirectError, SpecialTokens, Token

# Settings that change no id and no text.
WITHOUT_EFFECT = {
    *("backend", "chat_template", "errors", "model_max_length", "name_or_path"),
    *("processor_class", "sp_model_kwargs", "special_tokens_map_file", "tokenizer_class"),
    *("tokenizer_file", "use_default_system_prompt"),
}
SWITCHES = {
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"),
    *("legacy", "split_special_tokens"),
}
SIDES = {"padding_side", "truncation_side"}
# Of a tokenizer.json: those of 250,000 tokens have 15 MB to 35 MB.
MOST_BYTES = 256 << 20
UNKNOWN = "<unk>"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Any of these in a folder without tokenizer.json is what transformers reads.
OTHER_FORMATS = re.compile(r"tekken\.json|tokenizer\.model|tiktoken\.model|vocab_file|merges_file")


class DirectCodec:
    """The `tokenizers` library.

    Attributes:
        begin: the id of BOS, or else of EOS; None where the files name neither.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, begin: int | None) -> None:
        self._tokenizer, self.begin = tokenizer, begin
        tokenizer.no_padding()  # which the file may ask for

    def encode(self, text: str, max_length: int | None) -> list[int]:
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length, direction="left")
        return self._tokenizer.encode(text).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token(self, number: int) -> str | None:
        return self._tokenizer.id_to_token(number)


@dataclass(frozen=True)
class _Files:
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
        return read_bytes(path, MOST_BYTES) if path.exists() else None

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


def _as_the_file_says(files: _Files) -> tokenizers.Tokenizer:
    """tokenizer.json as it is."""
    if files.whole is None:
        raise NotDirectError
    return tokenizers.Tokenizer.from_buffer(files.whole)


def _gpt2(files: _Files) -> tokenizers.Tokenizer:
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


def _llama(files: _Files) -> tokenizers.Tokenizer:
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


def _byte_level(files: _Files, *, words: str | None) -> tokenizers.Tokenizer:
    """Byte-level BPE of normalized text, from tokenizer.json.

    Args:
        words: a pattern of what becomes tokens by itself; None is GPT-2's.
    """
    if files.whole is None:
        raise NotDirectError
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    tokenizer = tokenizers.Tokenizer(files.bpe(**empty))
    tokenizer.normalizer = normalizers.NFC()
    prefix_space = bool(files.settings.get("add_prefix_space"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=words is None)
    split = [] if words is None else [pre_tokenizers.Split(Regex(words), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _content(token: object) -> object:
    """The text of a token, which files write with its flags as well."""
    return token.get("content") if isinstance(token, dict) else token


def _gemma(files: _Files) -> tokenizers.Tokenizer:
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
class _Class:
    """One of transformers' classes.

    Attributes:
        build: makes the tokenizer, without the tokens that are added to it.
        defaults: special tokens, by kind, that it has where no file names another.
    """

    build: Callable[[_Files], tokenizers.Tokenizer]
    defaults: Mapping[str, Token | None]


BACKEND = _Class(_as_the_file_says, {})
TEXT_ENDS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
GPT2 = _Class(_gpt2, TEXT_ENDS)
GPT_NEOX = _Class(partial(_byte_level, words=None), TEXT_ENDS | {"pad_token": "<|padding|>"})
QWEN2 = _Class(
    partial(_byte_level, words=QWEN2_WORDS),
    {**TEXT_ENDS, "bos_token": None, "pad_token": "<|endoftext|>"},
)
GEMMA = _Class(
    _gemma,
    {f"{kind}_token": f"<{kind}>" for kind in ("bos", "eos", "pad", "mask")}
    | {"unk_token": UNKNOWN},
)
LLAMA = _Class(_llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})

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
    "GemmaTokenizer": GEMMA,
    "GemmaTokenizerFast": GEMMA,
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
    None: BACKEND,
}
# Types whose files name classes that they are not of.
OWN_CLASS = ("mistral", "phi3", "qwen2")


def load(folder: Path) -> DirectCodec | None:
    """The tokenizer of a folder; None where only transformers can say what it is.

    Raises:
        UserError: for JSON files that are none.
        Exception: whatever the library raises for its files.
    """
    files = _Files(folder, {})
    files = _Files(folder, files.optional("tokenizer_config.json") or {})
    try:
        _check_settings(files.settings)
        return _load(files, _class_of(files))
    except NotDirectError:
        return None


def _check_settings(settings: dict) -> None:
    known = WITHOUT_EFFECT | SWITCHES | SIDES | {*NAMED, *LISTS, "added_tokens_decoder"}
    if not settings.keys() <= known:
        raise NotDirectError
    if any(type(settings[key]) not in (bool, NoneType) for key in SWITCHES & settings.keys()):
        raise NotDirectError
    if settings.get("split_special_tokens", False) is None:
        raise NotDirectError
    if any(settings[key] not in ("left", "right") for key in SIDES & settings.keys()):
        raise NotDirectError


def _class_of(files: _Files) -> _Class:
    config = files.optional("config.json")
    if config is None:
        config = {"model_type": None}
    # transformers knows models by `model_name` whose files name a wrong class.
    if config.get("model_type", "") not in DEFAULT_CLASS or "model_name" in config:
        raise NotDirectError
    model_type = config["model_type"]
    if model_type == "mistral" and find_spec("mistral_common"):  # which transformers then asks
        raise NotDirectError
    name = files.settings.get("tokenizer_class") or config.get("tokenizer_class")
    if name is None or model_type in OWN_CLASS:
        return DEFAULT_CLASS[model_type]
    found = CLASSES.get(name)
    if found is None:
        raise NotDirectError
    # Llama 3's files say LlamaTokenizer, which they are not.
    if found is LLAMA and files.whole is not None and b'"ByteLevel"' in files.whole:
        return BACKEND
    return found


def _load(files: _Files, kind: _Class) -> DirectCodec:
    settings = files.settings
    tokenizer = kind.build(files)
    if settings.get("clean_up_tokenization_spaces") and not isinstance(tokenizer.model, models.BPE):
        raise NotDirectError
    special = SpecialTokens.read(
        settings,
        files.optional("special_tokens_map.json"),
        files.optional("added_tokens.json"),
        _own_tokens(files, kind, tokenizer),
    )
    special.named = {**kind.defaults, **special.named}
    if tokenizer.padding is not None:
        special.named.setdefault("pad_token", tokenizer.padding["pad_token"])
    tokenizer.encode_special_tokens = settings.get("split_special_tokens", False)
    present = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    tokenizer.add_tokens(special.missing(present))
    bos, eos = (special.named.get(key) for key in ("bos_token", "eos_token"))
    if kind is QWEN2:  # adds all of them once more, without flags
        named = [token for token in special.named.values() if token is not None]
        texts = dict.fromkeys(map(str, [*named, *special.extra]))
        tokenizer.add_tokens([tokenizers.AddedToken(text, special=True) for text in texts])
    if files.whole is None:
        tokenizer.post_processor = _around(settings, tokenizer, bos, eos)
    elif kind is GPT_NEOX:  # puts nothing around a text, whatever tokenizer.json says
        tokenizer.post_processor = _around({}, tokenizer, None, None)
    elif kind is not BACKEND:
        tokenizer.post_processor = _post_processor(files.parsed)
    first = bos if bos is not None else eos
    return DirectCodec(tokenizer, None if first is None else tokenizer.token_to_id(str(first)))


def _own_tokens(files: _Files, kind: _Class, tokenizer: tokenizers.Tokenizer) -> dict:
    """The added tokens of tokenizer.json, by id."""
    if files.whole is None or kind is BACKEND:
        return tokenizer.get_added_tokens_decoder()
    tokens = [dict(token) for token in files.parsed.get("added_tokens") or []]
    return {token.pop("id"): tokenizers.AddedToken(**token) for token in tokens}


def _around(
    settings: dict, tokenizer: tokenizers.Tokenizer, bos: Token | None, eos: Token | None
) -> processors.TemplateProcessing:
    """What puts BOS in front of a text, and EOS behind it, where the settings say so."""
    first = [str(bos)] if settings.get("add_bos_token") and bos is not None else []
    last = [str(eos)] if settings.get("add_eos_token") and eos is not None else []
    numbers = {token: tokenizer.token_to_id(token) for token in first + last}
    pieces = [f"{piece}:0" for piece in (*first, "$A", *last)]
    return processors.TemplateProcessing(
        single=" ".join(pieces), special_tokens=list(numbers.items())
    )


def _post_processor(parsed: dict) -> processors.PostProcessor | None:
    """tokenizer.json's own, which a class that builds its tokenizer itself takes from it."""
    model = {**parsed["model"], "vocab": {}, "merges": []}
    bare = json.dumps({**parsed, "model": model, "added_tokens": []})
    return tokenizers.Tokenizer.from_str(bare).post_processor
