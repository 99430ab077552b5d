"""Conversations: transformers' texts, answers that a fresh model gives, and what is read once."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from oracle import random_model
from transformers import LlamaConfig, Phi3Config

from qllm import LLM
from qllm.chat import DEFAULT_CONTEXT, Chat, ChatTemplate, context_size
from qllm.cli.console import Interrupt
from qllm.errors import UserError
from qllm.generation_config import GenerationConfig
from qllm.sampling import Sampling

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


PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content | selectattr('type', 'equalto', "
    "'text') %}{{ part.text | trim }}{% endfor %}\n\n{% endfor %}"
)
FAILS = "{% for m in messages %}{{ m.role + ': ' + m.content[0].text + '\n' }}{% endfor %}"


@pytest.mark.parametrize("source", [PARTS, FAILS])
def test_templates_that_know_messages_in_parts_alone_get_them(source, tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    messages = [{"role": "user", "content": " a"}, {"role": "assistant", "content": "b"}]
    assert ChatTemplate.load(tmp_path).render(messages).split() == ["user:", "a", "assistant:", "b"]


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


@pytest.mark.parametrize("kv_bits", [16, 4])
def test_the_oldest_turns_make_way(kv_bits, llm, folder, monkeypatch):
    """What is left is read as a fresh model reads it, of integers too."""
    monkeypatch.setattr(llm.model, "kv_bits", kv_bits)
    chat = chat_of(llm, folder, context=150, system="You are an old sailor who says what he saw.")
    for number in range(8):
        answer = "".join(chat.answer(f"the sea and the land and all that is in between {number}"))
        ids = chat._encode(chat.template.render(chat.messages[:-1]))
        assert answer == llm.generate(ids, max_new_tokens=6)[0].text
    assert len(chat.messages) < 16 and chat.messages[1]["role"] == "user"
    before = list(chat.messages)
    with pytest.raises(UserError, match=r"and the context 150; write a shorter one"):
        list(chat.answer("sea " * 200))
    assert chat.messages == before


def test_a_long_answer_to_come_leaves_the_conversation_half_of_the_context(llm, folder):
    chat = chat_of(llm, folder, count=512, context=512)
    for text in ("The sea was calm", "And then?", "Why?"):
        answer = chat.answer(text)
        next(answer)
        answer.close()
    assert [m["content"] for m in chat.messages[::2]] == ["The sea was calm", "And then?", "Why?"]


def test_a_message_that_ctrl_c_keeps_from_being_read_is_forgotten(llm, folder, monkeypatch):
    chat = chat_of(llm, folder)

    def interrupted(messages):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.template, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(chat.answer("The sea"))
    assert chat.messages == []


@pytest.mark.parametrize("kv_bits", [16, 4])
def test_a_message_that_ctrl_c_stops_being_read_spoils_no_other(kv_bits, llm, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.model, "kv_bits", kv_bits)
    chat = chat_of(llm, folder)
    list(chat.answer("The sea was calm that night " * 5))
    hook = llm.model.layers[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.answer("and the land and the sky " * 20))
    hook.remove()
    assert chat.messages.pop()["content"] == "" and chat.messages.pop()["role"] == "user"
    for text in ("Why?", "And then?"):
        answer = "".join(chat.answer(text))
        ids = chat._encode(chat.template.render(chat.messages[:-1]))
        assert answer == llm.generate(ids, max_new_tokens=6)[0].text


def test_a_context_is_the_model_s_or_what_was_asked_for(llm):
    config = llm.config
    assert context_size(config) == 512 and context_size(config, 60) == 60
    assert context_size(replace(config, max_positions=131072)) == DEFAULT_CONTEXT
    assert context_size(replace(config, max_positions=131072), 100_000) == 100_000
    assert context_size(replace(config, max_positions=None), 100_000) == 100_000
    with pytest.raises(
        UserError, match="a context of 513 tokens exceeds the model's window of 512"
    ):
        context_size(config, 513)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(Phi3Config, "longrope"), (LlamaConfig, "longrope"), (LlamaConfig, "dynamic")],
)
def test_a_text_outgrows_what_its_keys_were_made_for(family, kind, folder, tmp_path):
    """Longer texts have other keys: a conversation is read anew, by Phi-3 within an answer, too."""
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    for name in ("config.json", "model.safetensors"):
        (path / name).unlink()
    factors = [[1.0 + i / 4 for i in range(4)], [2.0 + i for i in range(4)]]
    rope = {"rope_type": "longrope", "short_factor": factors[0], "long_factor": factors[1]}
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 3.0}
    config = family(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
        max_position_embeddings=70 if kind == "dynamic" else 200,
        original_max_position_embeddings=70,
        rope_parameters=rope,
    )
    random_model(config).save_pretrained(path)
    llm = LLM.from_pretrained(path, dtype="float32")
    assert llm.config.rope.rereads == (family is Phi3Config)
    chat = chat_of(llm, path, count=30)
    for _ in range(2):
        for text in ("The sea was calm", "And then?", "Why?"):
            answer = "".join(chat.answer(text))
            ids = chat._encode(chat.template.render(chat.messages[:-1]))
            assert answer == llm.generate(ids, max_new_tokens=30)[0].text
        assert len(ids) > 70
        chat.reset()


def test_answers_are_drawn(llm, folder):
    """From a seed as `generate` draws; without one, from another each time."""
    sampling = Sampling(temperature=2.0, top_k=0)
    answers = []
    for seed in (5, 5, None, None):
        config = GenerationConfig(16, sampling=replace(sampling, seed=seed))
        chat = Chat(llm, ChatTemplate.load(folder), config)
        answers.append("".join(chat.answer("The sea")))
    ids = chat._encode(chat.template.render(chat.messages[:1]))
    settings = {"max_new_tokens": 16, "temperature": 2.0, "top_k": 0}
    assert answers[0] == answers[1] == llm.generate(ids, seed=5, **settings)[0].text
    assert len(set(answers)) == 3


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
    """One that cannot be answered is an error in the end, and others are answered."""
    import qllm_chat

    said = f"The sea\n/reset \r\n{'sea ' * 100}\nThe \udcff\n \nThe sea\r\n/exit\nmore\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    program = ["qllm_chat.py", "--model-path", str(folder), "--max-gen-tokens", "5"]
    monkeypatch.setattr(sys, "argv", [*program, "--ctx-size", "60"])
    assert qllm_chat.main() == 2
    found = capsys.readouterr()
    first, second = found.out.splitlines()
    assert first == second != ""
    error = r"^qllm_chat\.py: error: line "
    assert re.findall(error + r"4: the message is not UTF-8 text$", found.err, re.MULTILINE)
    too_long = error + r"3: the message has \d+ tokens .* and the context 60; write a shorter one$"
    assert re.findall(too_long, found.err, re.MULTILINE)
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sea\n"))
    assert qllm_chat.main() == 0


def test_each_ctrl_c_stops_what_there_is_and_another_signal_the_program(monkeypatch, capsys):
    """Those soon behind another, too, which elsewhere would disturb the end of the run."""
    import qllm_chat

    class Endless:
        def answer(self, text):
            yield text
            signal.raise_signal(signal.SIGINT)
            yield "more"

    def typed(prompt):
        line = next(lines)
        return signal.raise_signal(line) if isinstance(line, signal.Signals) else line

    lines = iter(["one", "two", signal.SIGINT, signal.SIGINT, "three", signal.SIGTERM])
    monkeypatch.setattr("builtins.input", typed)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handler = Interrupt()
    try:
        for number in before:
            signal.signal(number, handler)
        with pytest.raises(KeyboardInterrupt) as error:
            qllm_chat.talk(Endless())
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    assert error.value.args == (signal.SIGTERM,)
    hint = "\n/exit ends the conversation\n"
    assert capsys.readouterr().out == f"one\ntwo\n{hint}{hint}three\n"


def test_a_model_without_a_template(llm):
    with pytest.raises(UserError, match=r"has no chat template; qllm_gen\.py"):
        ChatTemplate.load(ROOT / "tiny_models" / "llama-tiny")
