"""Conversations: transformers' texts, answers that a fresh model gives, and what is read once."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
from conftest import ROOT

from qllm import LLM
from qllm.chat import Chat, ChatTemplate
from qllm.errors import UserError
from qllm.generation_config import GenerationConfig

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(ROOT / "tiny_models" / "llama-tiny", path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM.from_pretrained(folder, dtype="float32")


def chat_of(llm, folder, count=6, **more):
    config = GenerationConfig(max_new_tokens=count, eos_token_ids=())
    return Chat(llm, ChatTemplate.load(folder), config, **more)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ bos_token }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}\n  {% set ns.n = ns.n + 1 %}\n"
        "{%- endfor %}{{ ns.n }}{{ tools is defined and tools }}",
    ],
)
def test_templates_are_run_as_in_transformers(llm, folder, source):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "<a & 'b'> é"}, {"role": "assistant", "content": "c"}]
    want = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    tokens = {"bos_token": reference.bos_token} if reference.bos_token else {}
    assert ChatTemplate(source, tokens, "model").render(messages) == want


def test_answers_are_a_fresh_model_s(llm, folder, monkeypatch):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    chat, read = chat_of(llm, folder, system="Be brief."), []
    prefill = llm.model.prefill

    def counted(ids, *rest, **more):
        read.append(len(ids[0]))
        return prefill(ids, *rest, **more)

    monkeypatch.setattr(llm.model, "prefill", counted)
    for text in ("The sea was calm that night", "And then?", "Why?"):
        messages = [*chat.messages, {"role": "user", "content": text}]
        options = {"add_generation_prompt": True}
        rendered = reference.apply_chat_template(messages, tokenize=False, **options)
        assert chat.template.render(messages) == rendered
        ids = reference.apply_chat_template(messages, **options)["input_ids"]
        answer = "".join(chat.answer(text))
        assert answer == llm.generate(ids, max_new_tokens=6)[0].text
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
    turns = read[::2]  # between them are those of `generate`
    assert all(few < whole for few, whole in zip(turns[1:], read[3::2], strict=True))
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_the_oldest_turns_make_way(llm, folder):
    chat = chat_of(llm, folder)
    chat.window = 60
    for number in range(6):
        list(chat.answer(f"the sea and the land {number}"))
    assert len(chat.messages) < 12 and chat.messages[0]["role"] == "user"
    before = list(chat.messages)
    with pytest.raises(UserError, match=r"the model's window 60; write a shorter one"):
        list(chat.answer("sea " * 100))
    assert chat.messages == before


def test_an_answer_that_is_stopped_counts(llm, folder):
    chat = chat_of(llm, folder, count=40)
    answer = chat.answer("The sea")
    pieces = [next(answer), next(answer)]
    answer.close()
    assert chat.messages[-1]["content"] == "".join(pieces)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system message') }}", "fails .no system message"),
        ("{{ messages.__class__.__mro__ }}", "fails .*unsafe"),
        ("{% for m in %}", "is none"),
        ("{{ messages.append(1) }}", "fails .*"),
        ("{{ range(10**9) | list }}", "fails .*[Rr]ange"),
    ],
)
def test_a_template_that_fails_is_one_line(template, says):
    with pytest.raises(UserError, match=says) as error:
        ChatTemplate(template, {}, "model").render([{"role": "user", "content": "x"}])
    assert "\n" not in str(error.value)


def test_from_a_pipe_each_answer_is_a_line(folder, monkeypatch, capsys):
    import qllm_chat

    monkeypatch.setattr(sys, "stdin", io.StringIO("The sea\n/reset\nThe sea\n/exit\nmore\n"))
    program = ["qllm_chat.py", "--model-path", str(folder), "--max-gen-tokens", "5"]
    monkeypatch.setattr(sys, "argv", program)
    qllm_chat.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second != ""


def test_a_model_without_a_template(llm):
    with pytest.raises(UserError, match=r"has no chat template; qllm_gen\.py"):
        ChatTemplate.load(ROOT / "tiny_models" / "llama-tiny")
