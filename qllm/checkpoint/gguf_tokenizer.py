"""A checkpoint's tokenizer as a GGUF file's metadata: `qllm.gguf.tokenizer` the other way round."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from qllm.checkpoint.reader import read_json
from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.files import parse_json, read_bytes
from qllm.gguf import is_gguf
from qllm.gguf.config import CONTROL, END_KINDS, named_ends
from qllm.gguf.file import Value, read_gguf
from qllm.gguf.tokenizer import (
    BYTE,
    CHAT_TEMPLATE,
    DEFAULT_TEMPLATE,
    DIGIT,
    ENGLISH,
    GPT2,
    IGNORE_MERGES,
    NAME,
    PATTERNS,
    PHI3,
    PHI3_KEEPS_SPACES,
    UNKNOWN,
    USER_DEFINED,
    merges_of,
)
from qllm.models.family import RawConfig
from qllm.progress import Note, silent
from qllm.tokenizer import Tokenizer
from qllm.tokenizer.templates import read_templates

NORMAL, UNUSED = 1, 5
# Parts of patterns as checkpoints write them, and as `qllm.gguf.tokenizer` does.
SPELLED = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": ENGLISH,
    "[.,!?…。，、।۔،]": ".,!?…。，、।۔،",
    r"\p{N}{1}|": r"\p{N}|",
}
# Normalizers without which llama.cpp's tokens are the same, or that it has.
NORMALIZERS = {"NFC", "Prepend", "Replace", "Sequence"}


def tokenizer_metadata(source: Path, config: ModelConfig, note: Note = silent) -> dict[str, Value]:
    """The metadata of a checkpoint's tokenizer, and the model's name where tokens depend on it.

    Args:
        note: called with a line on tokens that llama.cpp cuts out of a text otherwise.

    Raises:
        UserError: for one that is no BPE as llama.cpp has it.
    """
    if is_gguf(source):
        found = read_gguf(source).metadata
        return {k: v for k, v in found.items() if k.startswith("tokenizer.") or k == NAME}
    tokenizer = Tokenizer.load(source, config.vocab_size)
    values = json.loads(tokenizer.definition())
    model, added = values["model"], {t["id"]: t for t in values.get("added_tokens") or ()}
    if model.get("type") != "BPE" or _kinds(values["normalizer"]) - NORMALIZERS:
        raise UserError(f"{source}: GGUF files are written of BPE as llama.cpp has it")
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    ids = range(config.vocab_size)
    tokens = [texts.get(i, f"<unused{i}>") for i in ids]
    types = [_type(added.get(i), i in texts) for i in ids]
    unknown = model.get("unk_token")
    whole: dict[str, Value] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if model.get("byte_fallback"):
        if unknown in tokens:
            types[tokens.index(unknown)] = UNKNOWN
            whole["tokenizer.ggml.unknown_token_id"] = tokens.index(unknown)
        for byte in range(256):
            text = f"<0x{byte:02X}>"
            if text in model["vocab"] and model["vocab"][text] < len(types):
                types[model["vocab"][text]] = BYTE
        whole |= _sentencepiece(source, values, tokens, types)
    else:
        whole |= _byte_level(source, values, set(tokens))
    whole |= _name(added, types, set(tokens), note)
    settings = _tokenizer_config(source)
    end = _named(settings, "eos_token", tokens) if tokenizer.tail is None else tokenizer.tail
    whole |= _ends(source, config, tokens, types, end)
    return whole | _settings(source, tokens, tokenizer, settings, note)


def _kinds(step: dict | None) -> set[str]:
    """The types of a normalizer and of those that it is made from."""
    if step is None:
        return set()
    return {step["type"]}.union(*map(_kinds, step.get("normalizers", ())))


def _type(added: dict | None, there: bool) -> int:
    """A token's type: control, defined by a user, normal or unused."""
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return NORMAL if there else UNUSED


def _name(
    added: dict[int, dict[str, Any]],
    types: list[int],
    tokens: set[str],
    note: Note,
) -> dict[str, Value]:
    """The name by which llama.cpp knows that tokens take the spaces behind them along."""
    cut = {t["content"] for i, t in added.items() if i < len(types)} & tokens
    ahead, behind, alone = (
        {t["content"] for t in added.values() if t[flag]} & cut
        for flag in ("lstrip", "rstrip", "single_word")
    )
    whole = tokens >= {"</s>", *PHI3_KEEPS_SPACES}  # without which llama.cpp does not load it
    if behind and whole and not ahead | alone and behind == cut - set(PHI3_KEEPS_SPACES):
        return {NAME: PHI3[0]}
    if odd := sorted(ahead | behind | alone):
        note(
            f"{odd[0]} takes spaces beside it along, or is cut out as a whole word alone; "
            "llama.cpp cuts it out wherever it stands, and leaves them"
        )
    return {}


def _byte_level(source: Path, values: dict[str, Any], tokens: set[str]) -> dict[str, Value]:
    """Byte-level BPE of `tokens`, with llama.cpp's name of the patterns that cut words."""
    found = _cuts(values["pre_tokenizer"])
    names = [name for name, patterns in PATTERNS.items() if patterns == found]
    if not names:
        raise UserError(
            f"{source}: GGUF files are written of tokenizers that cut texts as "
            f"{', '.join(PATTERNS)} do; this one does it otherwise"
        )
    whole = bool(values["model"].get("ignore_merges"))
    same = [name for name in names if (name in IGNORE_MERGES) == whole]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": [*same, *names][0],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(values, tokens)],
    }


def _cuts(step: dict[str, Any] | None) -> tuple[str, ...]:
    """The patterns by which a pre_tokenizer cuts a text, one after the other; "" is another way."""
    kind = None if step is None else step["type"]
    if step is None or (kind == "ByteLevel" and step["add_prefix_space"]):
        return ("",)
    if kind == "Sequence":
        return tuple(cut for each in step["pretokenizers"] for cut in _cuts(each))
    if kind == "ByteLevel":
        return (GPT2,) if step["use_regex"] else ()
    if kind == "Digits" and step["individual_digits"]:
        return (DIGIT,)
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        text = step["pattern"].get("Regex", "")
        for theirs, ours in SPELLED.items():
            text = text.replace(theirs, ours)
        return (text,)
    return ("",)


def _merges(values: dict[str, Any], tokens: set[str]) -> list[tuple[str, str]]:
    """Pairs of tokens that are joined, but for those that the model has no rows of."""
    listed = values["model"]["merges"]
    return [(a, b) for a, b in listed if a in tokens and b in tokens and a + b in tokens]


def _sentencepiece(
    source: Path, values: dict[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Value]:
    """SentencePiece's BPE: scores whose order is that of the merges.

    llama.cpp joins any two tokens that are one together, so that merges have to be all of these;
    but for tokens that are cut out of a text before.
    """
    cut = {t for t, kind in zip(tokens, types, strict=True) if kind not in (NORMAL, UNUSED)}

    def joined(merges: list[tuple[str, str]]) -> list[tuple[str, str]]:
        return [pair for pair in merges if cut.isdisjoint((*pair, "".join(pair)))]

    listed = joined(_merges(values, set(tokens)))
    order = [text for text, _ in groupby("".join(pair) for pair in listed)]
    ranks = {text: rank for rank, text in enumerate(order)}
    scores = [-float(ranks.get(text, len(order))) for text in tokens]
    before = json.dumps([values["normalizer"], values["pre_tokenizer"]], ensure_ascii=False)
    theirs = joined(merges_of(tokens, types, scores))
    if len(order) != len(ranks) or set(theirs) != set(listed) or "▁" not in before:
        raise UserError(
            f"{source}: GGUF files are written of byte-level BPE, and of SentencePiece's BPE, "
            "which joins any two tokens that are one together; this tokenizer is neither"
        )
    metaspace = '"Metaspace"' in before and '"prepend_scheme": "never"' not in before
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": metaspace or '"Prepend"' in before,
    }


def _tokenizer_config(source: Path) -> dict[str, Any]:
    """tokenizer_config.json, {} where there is none."""
    path = source / "tokenizer_config.json"
    values = parse_json(read_bytes(path), str(path)) if path.exists() else {}
    return values if isinstance(values, dict) else {}


def _named(settings: dict[str, Any], key: str, tokens: list[str]) -> int | None:
    """The id of a special token that tokenizer_config.json names."""
    named = settings.get(key)
    named = named.get("content") if isinstance(named, dict) else named
    return tokens.index(named) if named in tokens else None


def _ends(
    source: Path,
    config: ModelConfig,
    tokens: list[str],
    types: list[int],
    first: int | None,
) -> dict[str, Value]:
    """The tokens that end a text: three have keys, and llama.cpp knows some by their texts.

    Args:
        first: the one that the tokenizer has for it; the only one where no configuration says it.
            Without a key llama.cpp would take token 11 of a byte-level vocabulary, or 2.
    """
    path, listed = source / "generation_config.json", config.eos_token_ids
    if path.exists():
        listed = RawConfig(read_json(path), str(path)).tokens("eos_token_id") or listed
    ids = [i for i in listed if 0 <= i < len(tokens)]
    if first is not None and (first in ids or not ids):
        ids = [first, *ids]
    known = named_ends(tokens, types)
    ids = list(dict.fromkeys([*ids[:1], *(i for i in ids[1:] if i not in known)]))
    keys = (f"tokenizer.ggml.{kind}_token_id" for kind in END_KINDS)
    return dict(zip(keys, ids, strict=False))


def _settings(
    source: Path, tokens: list[str], tokenizer: Tokenizer, settings: dict[str, Any], note: Note
) -> dict[str, Value]:
    """What stands around each text, and the chat template."""
    found: dict[str, Value] = {}
    begin, prefix = _named(settings, "bos_token", tokens), tokenizer.prefix
    if len(prefix) > 1:  # as GLM-4's
        text = "".join(tokens[i] for i in prefix)
        note(f"llama.cpp puts no more than one token in front of a text: begin each with {text}")
    elif prefix:
        begin = prefix[0]
    if begin is not None:
        found["tokenizer.ggml.bos_token_id"] = begin
    found["tokenizer.ggml.add_bos_token"] = len(prefix) == 1
    found["tokenizer.ggml.add_eos_token"] = tokenizer.tail is not None
    for name, template in read_templates(source).items():
        found[CHAT_TEMPLATE if name == DEFAULT_TEMPLATE else f"{CHAT_TEMPLATE}.{name}"] = template
    return found
