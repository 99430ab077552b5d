"""A tokenizer by the `tokenizers` library alone, where its files are of the common kinds.

transformers' AutoTokenizer is what decides a tokenizer's ids, and takes a second to import. What it
does with the classes of `qllm.tokenizer.classes` and the settings below is done here, call by call;
where a folder says anything else, `load` says so, and transformers itself is asked.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import NoneType

import tokenizers
from tokenizers import models, processors

from qllm.tokenizer.classes import (
    BACKEND,
    CLASSES,
    DEFAULT_CLASS,
    GPT_NEOX,
    LLAMA,
    MISTRALS,
    OWN_CLASS,
    QWEN2,
    Files,
    TokenizerClass,
)
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


class DirectCodec:
    """The `tokenizers` library.

    Attributes:
        prefix_token_id: the id of BOS, or else of EOS; None where the files name neither.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prefix_token_id: int | None) -> None:
        self._tokenizer, self.prefix_token_id = tokenizer, prefix_token_id
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

    def definition(self) -> str:
        return self._tokenizer.to_str()


def load(folder: Path) -> DirectCodec | None:
    """The tokenizer of a folder; None where only transformers can say what it is.

    Raises:
        UserError: for JSON files that are none.
        Exception: whatever the library raises for its files.
    """
    files = Files(folder, {})
    files = Files(folder, files.optional("tokenizer_config.json") or {})
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


def _class_of(files: Files) -> TokenizerClass:
    config = files.optional("config.json")
    if config is None:
        config = {"model_type": None}
    # transformers knows models by `model_name` whose files name a wrong class.
    if config.get("model_type", "") not in DEFAULT_CLASS or "model_name" in config:
        raise NotDirectError
    model_type = config["model_type"]
    if model_type in MISTRALS and find_spec("mistral_common"):  # which transformers then asks
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


def _load(files: Files, kind: TokenizerClass) -> DirectCodec:
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


def _own_tokens(files: Files, kind: TokenizerClass, tokenizer: tokenizers.Tokenizer) -> dict:
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
