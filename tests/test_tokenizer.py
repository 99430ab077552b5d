"""Tokenizers against transformers' AutoTokenizer: every form they come in, and broken ones."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import oracle  # noqa: F401 - silences transformers
import pytest
from conftest import FAMILIES, tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qllm.errors import UserError
from qllm.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "a",
    "He is working on",
    "  leading and trailing spaces  ",
    "tabs\tand\r\nnew lines\n\n\n",
    "naïve café, Zürich, Ελληνικά, русский, עברית, العربية, हिन्दी, 日本語, 한국어",
    "🐟 👨‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 \u200b\ufeff\x00\x7f",
    "</s>in<s>side<pad> of<unk>text </s>",
    "1234567890 3.14159 1e-5 don't we'll I'VE",
    "x" * 300,
    "word " * 400,
    "def f(x):\n    return x ** 2  # 🙂\n",
]


@cache
def theirs(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.truncation_side = "left"
    return tokenizer


@cache
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name to folder: the bundled tokenizers, and one in the form of OPT's own repositories."""
    folder = tmp_path_factory.mktemp("opt-files")
    model = json.loads((tiny("opt") / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    end = {"__type": "AddedToken", "content": "</s>", "normalized": True, "lstrip": False}
    end |= {"rstrip": False, "single_word": False}
    settings = {
        "errors": "replace",
        "unk_token": end,
        "bos_token": end,
        "eos_token": end,
        "pad_token": "<pad>",
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(tiny("opt") / "config.json", folder)
    gpt2 = shutil.copytree(folder, folder.parent / "gpt2")
    (gpt2 / "config.json").write_text('{"model_type": "gpt2"}')
    return {family: tiny(family) for family in FAMILIES} | {"opt-files": folder, "gpt2": gpt2}


FORMS = [*FAMILIES, "opt-files", "gpt2"]


def assert_same(folder: Path, text: str) -> None:
    ids = theirs(folder)(text)["input_ids"]
    assert ours(folder).encode(text) == ids
    assert ours(folder).decode(ids) == theirs(folder).decode(ids, skip_special_tokens=True)
    for length in (1, 2, 3, 7, 50, len(ids) or 1):
        cut = theirs(folder)(text, truncation=True, max_length=length)["input_ids"]
        assert ours(folder).encode(text, length) == cut
        assert len(cut) <= length


@pytest.mark.parametrize("form", FORMS)
def test_texts_become_what_they_become_in_transformers(folders, form):
    for text in TEXTS:
        assert_same(folders[form], text)


@given(text=st.text(max_size=60), form=st.sampled_from(FORMS))
def test_any_text(folders, text, form):
    assert_same(folders[form], text)


@given(ids=st.lists(st.integers(0, 4095), max_size=30), form=st.sampled_from(FORMS))
def test_any_ids_become_the_same_text(folders, ids, form):
    folder = folders[form]
    assert ours(folder).decode(ids) == theirs(folder).decode(ids, skip_special_tokens=True)


def test_opt_begins_every_prompt_and_keeps_that_when_it_is_cut(folders):
    tokenizer = Tokenizer.load(folders["opt-files"])
    plain = Tokenizer.load(tiny("opt")).encode("one two three four five")
    assert tokenizer.encode("one two three four five") == [2, *plain]
    assert tokenizer.encode("one two three four five", 4) == [2, *plain[-3:]]
    assert tokenizer.encode("one two three four five") == [2, *plain]  # no length stays behind


def test_what_comes_before_a_text(folders, sentencepiece_folder):
    """The BOS that transformers' tokenizer names, and what it puts in front."""
    for name, folder in {**folders, "sentencepiece": sentencepiece_folder}.items():
        tokenizer, other = Tokenizer.load(folder), theirs(folder)
        assert tokenizer.prefix_token_id == other.bos_token_id, name
        added = other("a")["input_ids"] != other("a", add_special_tokens=False)["input_ids"]
        assert tokenizer.added_bos_id == (other.bos_token_id if added else None), name


def test_without_a_bos_the_end_of_text_stands_for_it_or_nothing(tmp_path):
    shutil.copy(tiny("opt") / "tokenizer.json", tmp_path)
    assert Tokenizer.load(tmp_path).prefix_token_id is None
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert Tokenizer.load(tmp_path).prefix_token_id == 2


def test_file_that_asks_for_padding_and_truncation(tmp_path):
    """What a tokenizer was last used with is in its file, and is no part of it."""
    values = json.loads((tiny("bloom") / "tokenizer.json").read_text())
    values["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    values["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(tiny("bloom") / name, tmp_path)
    for text in ("a", "one two three four five six"):
        want = Tokenizer.load(tiny("bloom")).encode(text)
        assert Tokenizer.load(tmp_path).encode(text) == want
        assert theirs(tmp_path)(text)["input_ids"] == want


@given(before=st.text(min_size=1, max_size=20), after=st.text(max_size=20))
def test_continuation_is_what_is_added(before, after):
    tokenizer = ours(tiny("llama"))
    prompt, ids = tokenizer.encode(before), tokenizer.encode(after)
    assert tokenizer.continuation(prompt, ids) == tokenizer.decode(ids)
    assert tokenizer.decode([*prompt, *ids]) == before_special(before) + tokenizer.decode(ids)


def before_special(text: str) -> str:
    """What is left of a text when it has been to tokens and back."""
    tokenizer = ours(tiny("llama"))
    return tokenizer.decode(tokenizer.encode(text))


def test_continuation_completes_a_character_that_the_prompt_began():
    tokenizer = ours(tiny("llama"))
    fish = tokenizer.encode("🐟")
    assert len(fish) > 2
    assert tokenizer.continuation(fish[:2], fish[2:]) == tokenizer.decode(fish[2:])


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A folder with nothing but SentencePiece's model, as Llama's first repositories have it."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(tiny("llama") / "config.json", folder)
    return folder


def test_sentencepiece_model(sentencepiece_folder):
    tokenizer = Tokenizer.load(sentencepiece_folder, 320)
    for text in ("the lazy fox", " dog", "naïve 🐟", ""):
        assert_same(sentencepiece_folder, text)
    ids = tokenizer.encode("the quick brown fox")
    assert ids[0] == 1
    assert tokenizer.encode("the quick brown fox", 3) == [1, *ids[-2:]]
    assert tokenizer.decode(ids) == "the quick brown fox"
    assert tokenizer.continuation(ids[:3], ids[3:]) in "the quick brown fox"
    with pytest.raises(UserError, match="vocabulary ends at 99"):
        Tokenizer.load(sentencepiece_folder, 100).encode("the quick brown fox")


BPE_FILES = {"vocab.json": '{"a": 0}', "merges.txt": ""}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer: neither tokenizer.json, vocab.json with merges.txt"),
        ({"vocab.json": "{}"}, "has no tokenizer"),
        ({"tekken.json": "{}"}, "has no tokenizer: .*; tekken.json is not read"),
        ({"tokenizer.json": "{"}, "the tokenizer cannot be read"),
        ({"tokenizer.json": ""}, "the tokenizer cannot be read"),
        ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "the tokenizer cannot be read"),
        ({"tokenizer.json": LFS}, "is a Git LFS pointer"),
        ({"tokenizer.model": LFS}, "is a Git LFS pointer"),
        ({"tokenizer.model": "no model"}, "the tokenizer cannot be read"),
        ({"vocab.json": "[]", "merges.txt": ""}, "the tokenizer cannot be read"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "the tokenizer cannot be read"),
        ({"vocab.json": '{"a": -1}', "merges.txt": ""}, "the tokenizer cannot be read"),
        ({"vocab.json": LFS, "merges.txt": ""}, "vocab.json is a Git LFS pointer"),
        ({"vocab.json": '{"a": 0}', "merges.txt": LFS}, "merges.txt is a Git LFS pointer"),
        ({**BPE_FILES, "tokenizer_config.json": "[1]"}, "holds no JSON object"),
        ({**BPE_FILES, "tokenizer_config.json": "{"}, "cannot be read as JSON"),
    ],
)
def test_broken_tokenizers_are_one_line(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path, 4096)
    assert "\n" not in str(error.value)
