"""Prompts: where they come from, and what becomes of those that are too long or none."""

from __future__ import annotations

import io

import pytest
from conftest import tiny
from inside import parsed

from qllm import cli
from qllm.errors import UserError
from qllm.tokenizer import Tokenizer


def test_prompts_come_from_everywhere_in_order(tmp_path, monkeypatch):
    path = tmp_path / "prompts"
    path.write_bytes("\ufefffrom a file\r\n\n  \nünd again\n".encode())
    options = ("--prompt", "one", "--prompt", "two\nlines", "--prompt-file", str(path))
    args = parsed("qllm_gen.py", monkeypatch, *options)
    assert cli.read_prompts(args) == ["one", "two\nlines", "from a file", "ünd again"]
    path = path.rename(tmp_path / "prompts.jsonl")
    path.write_text('{"prompt": "a\\nb", "text": "no"}\r\n\n{"text": "c"}', encoding="utf-8")
    args = parsed("qllm_gen.py", monkeypatch, "--prompt-file", str(path))
    assert cli.read_prompts(args) == ["a\nb", "c"]
    path.write_text('{"prompts": "a"}')
    with pytest.raises(UserError, match=r'jsonl: each line .* is \{"prompt": "…"\}; line 1 is not'):
        cli.read_prompts(args)


def test_standard_input_is_read_as_a_file_is(monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--stdin")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo")))
    assert cli.read_prompts(args) == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntw\xe9")))
    with pytest.raises(UserError, match="standard input is not UTF-8 text: line 2 has the byte"):
        cli.read_prompts(args)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="--stdin: standard input is closed"):
        cli.read_prompts(args)


def test_a_prompt_with_a_token_that_the_model_does_not_have(capsys):
    """What a prompt loses with its beginning does not count."""
    tokenizer = Tokenizer.load(tiny("opt"), 4000)
    with pytest.raises(UserError, match="prompt 2: the text becomes token 4095, "):
        cli.tokenize(tokenizer, ["a", "a" + tokenizer.decode([4095])], 20)
    cli.tokenize(tokenizer, [tokenizer.decode([4095]) + " the end"], 2)


def test_the_default_prompts(monkeypatch):
    expected = ["He is working on", "He has a", "Everyone is happy and I can"]
    assert cli.read_prompts(parsed("qllm_gen.py", monkeypatch)) == expected


@pytest.mark.parametrize("prompt", ["", "   ", "\n", "\udcff"])
def test_prompts_that_are_none(prompt, monkeypatch):
    args = parsed("qllm_gen.py", monkeypatch, "--prompt", "good", "--prompt", prompt)
    with pytest.raises(UserError, match="prompt 2 is"):
        cli.read_prompts(args)


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_a_long_prompt_loses_its_beginning_with_a_note(family, capsys):
    tokenizer = Tokenizer.load(tiny(family))
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    (whole,) = cli.tokenize(tokenizer, [text], 1000)
    assert capsys.readouterr().err == ""
    for limit in (len(whole) - 1, 5, 2, 1):
        (cut,) = cli.tokenize(tokenizer, [text], limit)
        assert len(cut) == limit
        special = sum(a == b for a, b in zip(cut, whole, strict=False) if a < 4)
        assert cut[special:] == whole[len(whole) - limit + special :]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("note: prompt ")
        assert f"{len(whole)} tokens" in lines[0]
        assert f"--max-prompt-length is {limit}" in lines[0]
