"""What a checkpoint's files say of its tokens, in every combination, against AutoTokenizer."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from conftest import tiny
from oracle import not_by_older
from tokenizer_files import PLAIN, SIZE, draw, write
from transformers import AutoTokenizer

from qllm.checkpoint.reader import read_raw_config
from qllm.errors import UserError
from qllm.evaluate.lambada import continuation
from qllm.evaluate.perplexity import PerplexityOptions, Text, Windows, cut
from qllm.huggingface import reference_generate
from qllm.models import read_config
from qllm.tokenizer import Tokenizer
from qllm.tokenizer.direct import DirectCodec

TEXTS = (
    "",
    "hi<|im_end|>there <s> x </s> end",
    "  the<tool> <|im_start|>naïve 🐟\n<pad> <unk> is n't , the .",
)
TYPED = {"__type": "AddedToken", **PLAIN}
END = {"content": "<|im_end|>", **PLAIN, "special": True}
GPT2 = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
LLAMA_3 = "Llama 3, which says it is Llama 2"
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}

# form, files (without ".json") and changes of tokenizer.json, as `write` takes them.
DIRECT = {
    "json": ("json", {}),
    "vocab and merges": ("files", {}),
    "llama 2": ("llama", {}),
    "no settings": ("json", {"tokenizer_config": None}),
    "no settings, vocab and merges": ("files", {"tokenizer_config": None}),
    "facebook/opt": (
        "files",
        {
            "tokenizer_config": {
                **GPT2,
                **{f"{kind}_token": TYPED | {"content": "</s>"} for kind in ("unk", "bos", "eos")},
                **{"pad_token": "<pad>", "errors": "replace", "add_prefix_space": False},
                **{"special_tokens_map_file": None, "name_or_path": "patrickvonplaten/opt-30b"},
            },
            "special_tokens_map": {
                **{f"{kind}_token": {"content": "</s>", **PLAIN} for kind in ("bos", "eos")},
                "pad_token": "<pad>",
            },
        },
    ),
    "meta-llama/Llama-2": (
        "llama",
        {
            "tokenizer_config": {
                **{"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False},
                **{"add_eos_token": False, "clean_up_tokenization_spaces": False},
                **{"bos_token": TYPED | {"content": "<s>"}, "pad_token": None},
                **{"model_max_length": 10**30, "padding_side": "right", "sp_model_kwargs": {}},
            },
            "special_tokens_map": {"bos_token": {"content": "<s>", **PLAIN}},
        },
    ),
    "added_tokens.json": (
        "files",
        {"tokenizer_config": GPT2 | NAMED, "added_tokens": {"<|im_end|>": SIZE}},
    ),
    "added_tokens_decoder": (
        "files",
        {"tokenizer_config": GPT2 | NAMED | {"added_tokens_decoder": {str(SIZE): END}}},
    ),
    "added_tokens_decoder beside tokenizer.json": (
        "json",
        {"tokenizer_config": NAMED | {"added_tokens_decoder": {str(SIZE): END}}},
    ),
    "added_tokens_decoder with other flags": (
        "json",
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"0": {**END, "content": "<s>", "lstrip": True}}
            }
        },
    ),
    "BOS in special_tokens_map.json alone": (
        "files",
        {"tokenizer_config": GPT2, "special_tokens_map": {"bos_token": "</s>"}},
    ),
    "no added tokens in tokenizer.json": (
        "json",
        {"tokenizer_config": NAMED},
        {"added_tokens": []},
    ),
    "additional_special_tokens": (
        "json",
        {"tokenizer_config": NAMED | {"additional_special_tokens": ["<tool>", "<|im_end|>"]}},
    ),
    "extra_special_tokens in both files": (
        "llama",
        {
            "tokenizer_config": {"extra_special_tokens": ["<tool>"]},
            "special_tokens_map": {"extra_special_tokens": ["<|im_end|>"]},
        },
    ),
    "split_special_tokens": ("json", {"tokenizer_config": NAMED | {"split_special_tokens": True}}),
    "add_eos_token": ("files", {"tokenizer_config": GPT2 | NAMED | {"add_eos_token": True}}),
    "add_prefix_space": ("files", {"tokenizer_config": GPT2 | {"add_prefix_space": True}}),
    "legacy": ("llama", {"tokenizer_config": LLAMA | {"legacy": True}}),
    "no space in front": (
        "llama",
        {"tokenizer_config": LLAMA | {"add_prefix_space": False}},
    ),
    "clean up, BPE": ("json", {"tokenizer_config": {"clean_up_tokenization_spaces": True}}),
    "the class in config.json": (
        "llama",
        {"config": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}}
        | {"tokenizer_config": None},
    ),
    "another model's class": ("json", {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}),
    "Qwen": (
        "json",
        {
            "config": {"model_type": "qwen3"},
            "tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"},
        },
    ),
    "Gemma": (
        "llama",
        {"config": {"model_type": "gemma2"}, "tokenizer_config": {"bos_token": "<s>"}},
    ),
    "Pythia": (
        "json",
        {
            "config": {"model_type": "gpt_neox"},
            "tokenizer_config": {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False},
        },
    ),
    "Phi, which says it is Llama": (
        "llama",
        {"config": {"model_type": "phi3"}, "tokenizer_config": LLAMA | {"legacy": False}},
    ),
    LLAMA_3: (
        "json",
        {"tokenizer_config": LLAMA},
    ),
}
BY_TRANSFORMERS = {
    "a kind of its own": ("json", {"tokenizer_config": {"image_token": "<tool>"}}),
    "kinds of their own": (
        "json",
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<tool>"}}},
    ),
    "clean up, words": ("words", {"tokenizer_config": {"clean_up_tokenization_spaces": True}}),
    "a class that is none": ("json", {"tokenizer_config": {"tokenizer_class": "Unknown"}}),
    "settings in special_tokens_map.json": (
        "files",
        {"special_tokens_map": {"split_special_tokens": True}},
    ),
    "auto_map": (
        "json",
        {"tokenizer_config": {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}}
        | {"config": {"model_type": "opt"}},
    ),
}


def assert_same(ours: Tokenizer, theirs) -> None:
    theirs.truncation_side = "left"
    begin = theirs.bos_token_id
    assert ours.prefix_token_id == (theirs.eos_token_id if begin is None else begin)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, 5) == theirs(text, truncation=True, max_length=5)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        for half in (2, len(ids) // 2):
            rest = theirs.decode(ids, skip_special_tokens=True)
            first = theirs.decode(ids[:half], skip_special_tokens=True)
            if rest.startswith(first):
                assert ours.continuation(ids[:half], ids[half:]) == rest[len(first) :]
    plain = theirs("hi", add_special_tokens=False)["input_ids"]
    whole = theirs("hi")["input_ids"]
    if not plain:  # a vocabulary without these letters does not say what stands where
        return
    before = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    behind = len(whole) - len(plain) - before
    assert ours.added_bos_id == (whole[0] if before else None)
    assert ours.tail == (whole[-1] if behind else None)
    assert ours.encode_open("hi") == whole[: len(whole) - behind]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=not_by_older if name == LLAMA_3 else ())
        for name in (*DIRECT, *BY_TRANSFORMERS)
    ],
)
def test_tokens_are_those_of_transformers(name, tmp_path):
    form, files, *whole = (DIRECT | BY_TRANSFORMERS)[name]
    folder = write(tmp_path, form, files, *whole)
    ours = Tokenizer.load(folder)
    assert_same(ours, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    # What the library does alone starts a second earlier.
    assert isinstance(ours._codec, DirectCodec) == (name in DIRECT)


def _encode_all(folder) -> None:
    ours = Tokenizer.load(folder)
    for text in TEXTS:
        ours.encode(text)


@not_by_older
@pytest.mark.parametrize("seed", range(8))
def test_any_combination_of_files(seed, tmp_path):
    random, same = Random(seed), 0
    for number in range(25):
        case = draw(random)
        folder = write(tmp_path / str(number), *case)
        try:
            theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            theirs(list(TEXTS))
        except Exception:  # whatever it raises is a refusal
            with pytest.raises(UserError):
                _encode_all(folder)
            continue
        try:
            assert_same(Tokenizer.load(folder), theirs)
        except AssertionError as error:
            error.add_note(json.dumps(case))
            raise
        same += 1
    assert same > 12


def test_a_token_that_the_model_does_not_have(tmp_path):
    """Files with added tokens are read; a text that becomes one cannot be encoded."""
    folder = write(tmp_path, "json", {"added_tokens": {"<|im_end|>": SIZE}})
    tokenizer = Tokenizer.load(folder, SIZE)
    assert tokenizer.encode("hi there") == AutoTokenizer.from_pretrained(folder).encode("hi there")
    message = rf"the text becomes token {SIZE}, '<\|im_end\|>', and the model's vocabulary ends at"
    with pytest.raises(UserError, match=message):
        tokenizer.encode("hi<|im_end|>there")
    assert tokenizer.encode("<|im_end|>hi there", 2) == tokenizer.encode("hi there")[-2:]
    assert Tokenizer.load(folder, SIZE + 1).encode("<|im_end|>")[-1] == SIZE


def test_a_begin_that_the_model_does_not_have(tmp_path):
    folder = write(tmp_path, "files", {"tokenizer_config": None})  # GPT-2's <|endoftext|> is added
    assert Tokenizer.load(folder).prefix_token_id == SIZE
    assert Tokenizer.load(folder, SIZE).prefix_token_id is None


def test_a_token_behind_a_text_is_no_part_of_what_is_scored(tmp_path):
    """As lm-evaluation-harness, which encodes without special tokens; other conventions, as the
    tools they come from, predict it."""
    settings = GPT2 | NAMED
    plain = Tokenizer.load(write(tmp_path / "plain", "files", {"tokenizer_config": settings}))
    settings = settings | {"add_eos_token": True}
    ended = Tokenizer.load(write(tmp_path / "ended", "files", {"tokenizer_config": settings}))
    assert ended.encode("hi") == [*plain.encode("hi"), ended.tail]
    for context in ("hi there", ""):
        found, want = (continuation(coder, context, " the end", None) for coder in (ended, plain))
        assert found == want
    config = read_config(read_raw_config(tiny("opt")))

    def windows(coder: Tokenizer, convention: str, max_tokens: int | None = None) -> Windows:
        text = Text.encode("the hi there the end", coder, max_tokens)
        (part,) = cut(text, config, PerplexityOptions((convention,), window=4))
        return part.windows

    assert windows(ended, "byte") == windows(plain, "byte")
    assert windows(ended, "byte", 5) == windows(plain, "byte", 5)
    assert windows(ended, "strided").ids == [*windows(plain, "strided").ids, ended.tail]


def test_the_reference_fills_up_with_a_token_of_the_model(tmp_path):
    """transformers pads with the tokenizer's pad token, for which the model may have no row."""
    for path in tiny("opt").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<fill>"}')
    assert Tokenizer.load(tmp_path, 4096).encode("a")
    prompts = ["He is working on", "He has"]
    options = {"max_prompt_length": 20, "max_new_tokens": 4, "dtype": torch.float32}
    found = reference_generate(tmp_path, prompts, **options)
    assert found.tokens == reference_generate(tiny("opt"), prompts, **options).tokens


def test_byte_order_marks(tmp_path):
    plain = write(tmp_path / "plain", "files", {"tokenizer_config": GPT2 | NAMED})
    for name, codec in {"direct": {}, "transformers": {"image_token": "<tool>"}}.items():
        settings = GPT2 | NAMED | codec
        marked = write(tmp_path / name, "files", {"tokenizer_config": settings})
        for path in marked.iterdir():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        for text in TEXTS[:2]:
            assert Tokenizer.load(marked).encode(text) == Tokenizer.load(plain).encode(text)


def test_a_path_that_is_no_text(tmp_path):
    """What a locale makes of a name must not reach the libraries, which take UTF-8 alone."""
    folder = write(tmp_path / "\udce9", "files", {"tokenizer_config": GPT2 | NAMED})
    assert Tokenizer.load(folder).encode("hi")[0] == 0


# The Rust library panics where it reads the first, and where it encodes with the second.
UNREADABLE = {"type": "Precompiled", "precompiled_charsmap": ""}
UNUSABLE = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (("json", {"tokenizer_config": {"bos_token": "\ud800"}}), "cannot be read"),
        (("files", {"tokenizer_config": GPT2 | {"bos_token": "\ud800"}}), "cannot be read"),
        (("json", {"tokenizer_config": {"bos_token": 7}}), "cannot be read"),
        (("json", {"added_tokens": {"\ud800": SIZE}}), "cannot be read"),
        (("json", {}, {"normalizer": UNREADABLE}), "cannot be read .*Cannot parse"),
        (("json", {}, {"normalizer": UNUSABLE}), "cannot be read .index out of bounds"),
        (("json", {"tokenizer_config": {"tokenizer_class": ["x"]}}), "cannot be read"),
    ],
)
def test_broken_files_are_one_line(case, message, tmp_path, capfd):
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(write(tmp_path, *case))
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_panic_while_encoding_is_one_line(tmp_path):
    class PanicException(BaseException):
        """As the library raises it."""

    def encode(text, max_length):
        raise PanicException("index out of bounds")

    tokenizer = Tokenizer.load(write(tmp_path, "json", {}))
    tokenizer._codec.encode = encode
    with pytest.raises(UserError, match=r"cannot encode the text .index out of bounds"):
        tokenizer.encode("a")


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    with pytest.raises(UserError, match=r"holds '\\ud83d', half a surrogate pair"):
        Tokenizer.load(write(tmp_path, "json", {})).encode("a \ud83d b")
