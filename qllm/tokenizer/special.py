"""The special and added tokens that a tokenizer's files name, as transformers merges them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken


class NotDirectError(Exception):
    """The files say what only transformers does."""


@dataclass
class SpecialTokens:
    """What the files name.

    Attributes:
        named: by kind, "bos_token" and so on; None where a file says there is none.
        extra: those without a kind.
        added: by the ids that the files give them.
    """

    named: dict[str, Token | None]
    extra: list[Token]
    added: dict[int, AddedToken]

    @classmethod
    def read(
        cls,
        settings: dict,
        named: dict | None,
        added: dict | None,
        own: dict[int, AddedToken],
    ) -> SpecialTokens:
        """Merge the files.

        Args:
            settings: tokenizer_config.json. Its `added_tokens_decoder`, where it has one, stands
                for all of the following.
            named: special_tokens_map.json, whose values count before those of the settings.
            added: added_tokens.json, texts to ids.
            own: the added tokens of tokenizer.json.

        Raises:
            NotDirectError: for values of a kind that transformers refuses or takes differently.
        """
        values = {key: settings[key] for key in NAMED if key in settings}
        values |= {key: _list(settings[key]) for key in LISTS if key in settings}
        if LISTS[1] in values and not values.get(LISTS[0]):
            values[LISTS[0]] = values.pop(LISTS[1])
        if "added_tokens_decoder" in settings:
            tokens = _decoder(settings["added_tokens_decoder"])
            by_text = {token.content: token for token in tokens.values()}
        else:
            _override(values, named or {})
            tokens = _legacy(added or {}, values)
            by_text = {token.content: token for token in (*tokens.values(), *own.values())}
            tokens |= own
        # One name of the list is the older one of the other.
        extra = values.get(LISTS[0]) if LISTS[0] in values else values.get(LISTS[1])
        found = {key: _typed(values[key]) for key in NAMED if key in values}
        found = {key: token and by_text.get(str(token), token) for key, token in found.items()}
        typed = [_typed(token) for token in _list(extra)]
        return cls(found, [token for token in typed if token is not None], tokens)

    def missing(self, present: Iterable[str]) -> list[AddedToken]:
        """What is added to a tokenizer that has the tokens `present`, in order.

        A token of `added` counts whether it is present or not: its flags may differ.
        """
        tokens: list[Token] = [token for _, token in sorted(self.added.items())]
        known = {*present, *map(str, tokens)}
        named = [token for key in NAMED if (token := self.named.get(key)) is not None]
        for token in (*named, *self.extra):
            if str(token) not in known and token not in tokens:
                tokens.append(token)
        special = set(map(str, named))
        return [_added(token, special) for token in tokens]


def _added(token: Token, special: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in special:
        token.special = True
    return token


def _override(values: dict, named: dict) -> None:
    """Put what special_tokens_map.json says over the settings."""
    for key, value in named.items():
        if key == LISTS[0] and value is not None:
            tokens = list(values.get(key) or [])
            for entry in _list(value):
                token = entry if isinstance(entry, str) else _flagged(entry, special=True)
                if token not in tokens:
                    tokens.append(token)
            values[key] = tokens
        elif key not in (*NAMED, *LISTS):
            raise NotDirectError
        elif isinstance(value, dict):
            flags = {name: flag for name, flag in value.items() if name != "special"}
            values[key] = _flagged(flags, special=True)
        else:
            values[key] = value


def _legacy(added: dict, values: dict) -> dict[int, AddedToken]:
    """The tokens of added_tokens.json: special where they are named as text.

    One that the settings name with flags, as an object, does not count as named.
    """
    named = [values[key] for key in NAMED if values.get(key)]
    special = {str(token) for token in (*named, *_list(values.get(LISTS[0])))}
    tokens: dict[int, AddedToken] = {}
    for text, number in added.items():
        if type(number) is not int or number in tokens or not text:
            raise NotDirectError
        is_special = text in special
        tokens[number] = AddedToken(
            text, lstrip=False, rstrip=False, normalized=not is_special, special=is_special
        )
    return tokens


def _decoder(value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, dict) or not all(number.isdecimal() for number in value):
        raise NotDirectError
    return {int(number): _flagged(token) for number, token in value.items()}


def _list(value: Any) -> list:
    """A list of tokens; none where it is null."""
    if not isinstance(value, list | None):
        raise NotDirectError
    return value or []


def _typed(value: Any) -> Token | None:
    """A token as tokenizer_config.json writes it: a text, or a typed object."""
    if value is None or isinstance(value, AddedToken) or (isinstance(value, str) and value):
        return value
    if not isinstance(value, dict) or value.get("__type") != "AddedToken":
        raise NotDirectError
    return _flagged({key: flag for key, flag in value.items() if key != "__type"})


def _flagged(value: Any, **given: bool) -> AddedToken:
    """A token from an object of its text and flags."""
    if not isinstance(value, dict):
        raise NotDirectError
    flags = {key: flag for key, flag in value.items() if key != "content"} | given
    content = value.get("content")
    usable = isinstance(content, str) and content and not set(given) & set(value)
    if not usable or not all(k in FLAGS and type(v) is bool for k, v in flags.items()):
        raise NotDirectError
    return AddedToken(content, **flags)
