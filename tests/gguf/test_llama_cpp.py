"""What llama.cpp makes of GGUF files that are written here, and of their texts, is what is here.

Where llama-cpp-python is not installed, these are skipped.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from shutil import copytree

import numpy as np
import pytest
from conftest import ROOT, tiny
from covering import each, slow_but
from gguf_files import (
    ENDS,
    PHI3_TEXTS,
    checkpoint_of,
    ending,
    stretch_rope,
    trained_sentencepiece,
    with_phi3_s_tokens,
    write_model,
)
from gguf_models import FAMILIES, READ_ALONE

from qllm import LLM
from qllm.checkpoint.to_gguf import export_gguf
from qllm.config import QuantPlan, QuantSpec
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.tokenizer import Tokenizer

llama_cpp = pytest.importorskip("llama_cpp")

SPECS = {
    "F16": None,
    "Q8_0": QuantSpec(8, 32, "sym", "weight_only"),
    "Q4_0": QuantSpec(4, 32, "sym", "weight_only"),
    "Q4_1": QuantSpec(4, 32, "asym", "weight_only"),
    "Q5_0": QuantSpec(5, 32, "sym", "weight_only"),
    "Q5_1": QuantSpec(5, 32, "asym", "weight_only"),
}
NEW_TOKENS = 24
# Of the logits' range: llama.cpp sums in float16 at 16 bits, and rounds activations to 8 bits in
# front of blocks.
NEAR = dict.fromkeys(SPECS, 0.01) | {"F16": 0.002}


@cache
def silenced() -> object:
    """llama.cpp writes pages to standard error."""

    @llama_cpp.llama_log_callback
    def silent(level: int, text: bytes, data: object) -> None:
        pass

    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    return silent


class LlamaCpp:
    """A file as llama.cpp has it."""

    def __init__(self, path: Path, *, vocabulary_alone: bool = False) -> None:
        silenced()
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only = vocabulary_alone
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp does not load {path}"
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 16))()
        options = (ids, len(ids), True, True)  # BOS where the file says so; special tokens
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), *options)
        return ids[:count]

    def logits(self, prompt: list[int], new: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Logits behind a prompt, and behind each of the new tokens but the last."""
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = len(prompt) + len(new) + 8
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0  # float32
        settings.flash_attn_type = 0
        context = llama_cpp.llama_init_from_model(self.model, settings)
        size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        for tokens in (prompt, *([token] for token in new[:-1])):
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            batch = llama_cpp.llama_batch_get_one(array, len(tokens))
            assert llama_cpp.llama_decode(context, batch) == 0
            found = llama_cpp.llama_get_logits_ith(context, -1)
            yield np.ctypeslib.as_array(found, (size,)).copy()
        llama_cpp.llama_free(context)


@contextmanager
def opened(path: Path, **options: bool) -> Iterator[LlamaCpp]:
    found = LlamaCpp(path, **options)
    yield found
    llama_cpp.llama_model_free(found.model)


def assert_same_tokens(path: Path, near: float) -> None:
    """llama.cpp takes each of our tokens for the likeliest, or for one as likely."""
    llm = LLM.from_pretrained(path, dtype="float32")
    with opened(path) as theirs:
        for prompt in ("He is working on", "Once upon a time there was"):
            (ours,) = llm.generate(prompt, max_new_tokens=NEW_TOKENS)
            pairs = zip(
                ours.tokens, theirs.logits(list(ours.prompt_tokens), ours.tokens), strict=True
            )
            for token, logits in pairs:
                assert logits.max() - logits[token] <= near * np.ptp(logits)


@pytest.mark.parametrize(("family", "kind"), slow_but(each(FAMILIES, SPECS), FAMILIES, SPECS))
def test_the_same_tokens_of_what_is_written(tmp_path, family, kind):
    spec = SPECS[kind]
    source = checkpoint_of(family, tmp_path / "source", all_experts=spec is not None)
    if spec is not None:
        quantize_checkpoint(Job(source, QuantPlan.uniform(spec)), tmp_path / "quantized")
        source = tmp_path / "quantized"
    path = tmp_path / "model.gguf"
    export_gguf(source, path, round_offsets=True)
    assert_same_tokens(path, NEAR[kind])


@pytest.mark.parametrize(
    "family",
    [
        *("gemma2", "gemma3", "phi3", "gptneox", "gpt2"),
        *("starcoder2", "granite", "smollm3", "olmo2", "olmo3", "ministral3"),
        *("glm", "glm4", "cohere", "cohere2", "exaone4", "ernie4_5"),
        *("gemma", "stablelm", "olmo", "seed_oss", "phi", "arcee"),
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss"),
        *READ_ALONE,
    ],
)
def test_the_same_tokens_of_what_is_read(tmp_path, family):
    # llama.cpp chooses LongRoPE's factors by the size of the cache.
    options = {"long": False} if family == "phi3" else {}
    path = write_model(tmp_path / "model.gguf", (FAMILIES | READ_ALONE)[family](**options), "F16")
    assert_same_tokens(path, NEAR["F16"])


@pytest.mark.parametrize(
    ("family", "scaled"),
    [
        ("llama", "llama3"),
        ("llama", "longrope"),
        ("granite", "longrope"),
        ("exaone4", "llama3"),
        ("arcee", "llama3"),
    ],
)
def test_the_same_tokens_of_rope_s_factors(tmp_path, family, scaled):
    source, path = tmp_path / "source", tmp_path / "model.gguf"
    if checkpoint_of(family, source) != source:
        copytree(tiny(family), source)
    stretch_rope(source / "config.json", scaled)
    export_gguf(source, path)
    assert_same_tokens(path, NEAR["F16"])


def strings() -> list[str]:
    """Pieces of a text, and characters of many kinds."""
    random = Random(0)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    odd = "abcXYZ019 \n\t'.,!?-_()[]{}<>|/\\\"#éßøΩжק中あ한😀\u0301\u00a0\u2028²½"
    found = ["", " ", "  x", "x  ", "\r\n", "I'll don't WE'RE", "1234567", "你好，世界", "x</s>y"]
    while len(found) < 700:
        at = random.randrange(len(text))
        found.append(text[at : at + random.randint(1, 80)])
    while len(found) < 1000:
        found.append("".join(random.choices(odd, k=random.randint(1, 30))))
    return found


@pytest.mark.parametrize("kind", ["llama", "bloom", "sentencepiece"])
def test_the_same_tokens_of_a_thousand_strings(tmp_path, kind):
    path, source = tmp_path / "model.gguf", tmp_path / "source"
    if kind == "sentencepiece":
        FAMILIES["llama"]().half().save_pretrained(source)
        trained_sentencepiece(source / "tokenizer")
    else:
        source = tiny(kind)
    export_gguf(source, path)
    ours = Tokenizer.load(source)
    with opened(path, vocabulary_alone=True) as theirs:
        differ = [text for text in strings() if ours.encode(text) != theirs.tokenize(text)]
    assert not differ, json.dumps(differ[:5])


@pytest.mark.parametrize(("config", "generation", "ends"), ENDS)
def test_the_same_tokens_end_a_text(tmp_path, config, generation, ends):
    path = tmp_path / "model.gguf"
    export_gguf(ending(tmp_path / "source", config, generation), path)
    with opened(path, vocabulary_alone=True) as theirs:
        ids = range(llama_cpp.llama_vocab_n_tokens(theirs.vocabulary))
        assert [i for i in ids if llama_cpp.llama_vocab_is_eog(theirs.vocabulary, i)] == ends


def test_phi_3_s_tokens_take_the_spaces_behind_them_along(tmp_path):
    source, path = with_phi3_s_tokens(tmp_path / "source"), tmp_path / "model.gguf"
    export_gguf(source, path)
    ours = Tokenizer.load(source)
    with opened(path, vocabulary_alone=True) as theirs:
        for text in PHI3_TEXTS:
            assert ours.encode(text) == theirs.tokenize(text)
