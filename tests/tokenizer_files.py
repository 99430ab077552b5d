"""Tokenizers of a few hundred tokens, in every form that a checkpoint's files may have."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from random import Random

from conftest import tiny

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
PLAIN = dict.fromkeys(FLAGS, False)
SIZE = 400  # of the byte-level vocabulary


@cache
def _byte_level() -> dict:
    """The first tokens of a bundled tokenizer, and their merges."""
    values = json.loads((tiny("opt") / "tokenizer.json").read_text())
    model = values["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < SIZE}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return values


@cache
def _metaspace() -> dict:
    """In the form of Llama 2's: "▁" for a space, bytes where a character has no token."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, "▁", *"abcdefghijklmnopqrstuvwxyz<>|_/"]
    merges = ["t h", "h e", "i n", "e r", "r e", "▁ t", "▁t h", "▁th e", "▁ i", "▁ <", "▁ ▁"]
    tokens += [pair.replace(" ", "") for pair in merges]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
    special = [{"id": i, "content": t, **PLAIN, "special": True} for i, t in enumerate(tokens[:3])]
    prepend = {"type": "Prepend", "prepend": "▁"}
    return {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": special},
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]},
        "pre_tokenizer": None,
        "post_processor": in_front("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True},
            **{"byte_fallback": True, "ignore_merges": False},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None},
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


@cache
def _words() -> dict:
    """Whole words."""
    tokens = ["<unk>", "<s>", "</s>", *("the", "a", "hi", "there")]
    tokens += [".", ",", "is", "n", "'", "t"]
    model = {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}}
    values = {**_metaspace(), "normalizer": None, "decoder": None}
    values["pre_tokenizer"] = {"type": "Whitespace"}
    return values | {"model": {**model, "unk_token": "<unk>"}}


def in_front(token: str, number: int) -> dict:
    """A post-processor that puts a token in front of a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": texts,
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


FORMS = {"json": _byte_level, "files": _byte_level, "llama": _metaspace, "words": _words}
FAMILY = {"json": "bloom", "files": "opt", "llama": "llama", "words": "bloom"}
CLASSES = {
    "json": "BloomTokenizerFast",
    "files": "GPT2Tokenizer",
    "llama": "LlamaTokenizer",
    "words": "PreTrainedTokenizerFast",
}


def write(folder: Path, form: str, files: dict, whole: dict | None = None) -> Path:
    """A checkpoint's folder without weights.

    Args:
        form: of FORMS; "files" is vocab.json and merges.txt, the others are tokenizer.json.
        files: by name, without ".json". Settings that are not given are the form's ordinary ones.
        whole: changes tokenizer.json, and with "files" writes one.
    """
    folder.mkdir(exist_ok=True)
    values = deepcopy(FORMS[form]()) | (whole or {})
    if form == "files":
        (folder / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
        merges = ["#version: 0.2", *map(" ".join, values["model"]["merges"]), ""]
        (folder / "merges.txt").write_text("\n".join(merges))
    if form != "files" or whole is not None:
        (folder / "tokenizer.json").write_text(json.dumps(values))
    files = {
        "config": {"model_type": FAMILY[form]},
        "tokenizer_config": {"tokenizer_class": CLASSES[form], "bos_token": "<s>"},
        **files,
    }
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


FAMILIES = (
    *("qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi3", "mistral", "gpt2"),
    *("starcoder2", "granite", "smollm3", "olmo2", "olmo3", "glm", "glm4", "cohere", "cohere2"),
    *("ernie4_5", "stablelm", "gemma", "olmo", "phi"),
    *("ministral3", "mistral3", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)
OTHERS = (
    *("CohereTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizerFast", "GPTNeoXTokenizer"),
    "Unknown",
)
NAMES = ("<|im_end|>", "<|im_start|>", "<tool>", "the", " x ", "<pad>", "<s>", "</s>", "<unk>")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
SWITCHES = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens"),
    "clean_up_tokenization_spaces",
)


def draw(random: Random) -> tuple[str, dict, dict | None]:
    """A form, files and changes of tokenizer.json, as `write` takes them: anything goes."""

    def chance(share: float) -> bool:
        return random.random() < share

    def flags(**more: bool) -> dict:
        return {key: chance(0.3) for key in FLAGS} | more

    def token(*, typed: bool) -> object:
        text = random.choice(NAMES)
        flagged = {"content": text, **flags()} | ({"__type": "AddedToken"} if typed else {})
        return random.choice([text, text, flagged, flagged, None])

    def tokens(*, typed: bool) -> list | None:
        some = [token(typed=typed) for _ in range(random.randint(0, 2))]
        return random.choice([None, [each for each in some if each is not None]])

    form = random.choice(tuple(FORMS))
    values = FORMS[form]()
    size = len(values["model"]["vocab"])
    whole = {}
    added = random.choice(
        [
            values["added_tokens"],
            values["added_tokens"],
            [],
            [*values["added_tokens"], {"id": size, "content": "<|im_end|>", **flags(special=True)}],
        ]
    )
    whole["added_tokens"] = added
    if chance(0.4):
        end = in_front("</s>", values["model"]["vocab"]["</s>"])
        whole["post_processor"] = random.choice([None, end])
    names = [CLASSES[form]] * 3 + [None, *CLASSES.values(), *OTHERS]
    config = {"model_type": random.choice([*FAMILY.values(), *FAMILIES])}
    config |= {"tokenizer_class": random.choice(names)} if chance(0.1) else {}
    settings: dict[str, object] = {"tokenizer_class": random.choice(names)}
    settings |= {key: token(typed=True) for key in NAMED if chance(0.4)}
    settings |= {key: chance(0.6) for key in SWITCHES if chance(0.2)}
    settings |= {key: tokens(typed=True) for key in LISTS if chance(0.1)}
    if chance(0.3):
        known = {str(each["id"]): {**each} for each in added if chance(0.9)}
        new = {str(size + random.randint(0, 2)): {"content": random.choice(NAMES), **flags()}}
        decoder = known | (new if chance(0.6) else {})
        settings["added_tokens_decoder"] = {
            number: {key: flag for key, flag in each.items() if key != "id"}
            for number, each in decoder.items()
        }
    files: dict[str, dict | None] = {"config": config, "tokenizer_config": settings}
    if chance(0.4):
        named = {key: token(typed=False) for key in NAMED if chance(0.4)}
        files["special_tokens_map"] = named | {
            key: tokens(typed=False) for key in LISTS if chance(0.1)
        }
    if chance(0.3):
        texts = random.sample(NAMES, random.randint(1, 2))
        files["added_tokens"] = {text: size + 2 * i for i, text in enumerate(texts)}
    return form, files, whole if form != "files" or chance(0.3) else None
