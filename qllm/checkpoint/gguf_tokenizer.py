"""A checkpoint's tokenizer as a GGUF file's metadata: `qllm.gguf.tokenizer` the other way round."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from qllm.config import ModelConfig
from qllm.errors import UserError
from qllm.files import parse_json, read_bytes
from qllm.gguf import is_gguf
from qllm.gguf.file import Value, read_gguf
from qllm.gguf.tokenizer import (
    BYTE,
    CHAT_TEMPLATE,
    CONTROL,
    DIGIT,
    ENGLISH,
    GPT2,
    IGNORE_MERGES,
    PATTERNS,
    UNKNOWN,
    USER_DEFINED,
    merges_of,
)
from qllm.tokenizer import Tokenizer

NORMAL, UNUSED = 1, 5
# Parts of patterns as checkpoints write them, and as `qllm.gguf.tokenizer` does.
SPELLED = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": ENGLISH,
    "[.,!?…。，、।۔،]": ".,!?…。，、।۔،",
}
# Normalizers without which llama.cpp's tokens are the same, or that it has.
NORMALIZERS = {"NFC", "Prepend", "Replace", "Sequence"}


def tokenizer_metadata(source: Path, config: ModelConfig) -> dict[str, Value]:
    """The metadata of a checkpoint's tokenizer.

    Raises:
        UserError: for one that is no BPE as llama.cpp has it.
    """
    if is_gguf(source):
        found = read_gguf(source).metadata
        return {key: value for key, value in found.items() if key.startswith("tokenizer.")}
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
    if config.eos_token_ids:
        whole["tokenizer.ggml.eos_token_id"] = config.eos_token_ids[0]
    return whole | _settings(source, tokens, tokenizer)


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


def _settings(source: Path, tokens: list[str], tokenizer: Tokenizer) -> dict[str, Value]:
    """What stands around each text, and what tokenizer_config.json says besides."""
    path = source / "tokenizer_config.json"
    values = parse_json(read_bytes(path), str(path)) if path.exists() else {}
    values = values if isinstance(values, dict) else {}
    found: dict[str, Value] = {}
    named = values.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if tokenizer.added_bos_id is not None:
        found["tokenizer.ggml.bos_token_id"] = tokenizer.added_bos_id
    elif named in tokens:
        found["tokenizer.ggml.bos_token_id"] = tokens.index(named)
    found["tokenizer.ggml.add_bos_token"] = tokenizer.added_bos_id is not None
    found["tokenizer.ggml.add_eos_token"] = tokenizer.tail is not None
    own = source / "chat_template.jinja"
    template = values.get("chat_template")
    if own.exists():
        template = read_bytes(own).decode("utf-8", "replace")
    if isinstance(template, str):
        found[CHAT_TEMPLATE] = template
    return found
