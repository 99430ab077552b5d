"""The texts that the documentation's commands name, from a Hub of a few lines."""

from __future__ import annotations

import json
import sys

import pytest

from qllm.data import load_rows, load_text
from qllm.errors import UserError
from tools import fetch_texts

ROWS = {
    ("Salesforce/wikitext", "validation"): [" = Valid = \n", "", " text \n"],
    ("Salesforce/wikitext", "test"): [" = Test = \n", " text \n"],
    ("EleutherAI/lambada_openai", "test"): ["He went to the sea", "\u201cYes\u201d"],
}


def test_files_are_the_rows_as_they_were(monkeypatch, tmp_path):
    def load_dataset(repository, config, split):
        assert config == {"Salesforce/wikitext": "wikitext-2-raw-v1"}.get(repository, "default")
        return {"text": ROWS[repository, split]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(sys, "argv", ["fetch_texts", "--save", str(tmp_path / "texts")])
    fetch_texts.main()
    folder = tmp_path / "texts"
    assert load_text(str(folder / "wiki.valid.raw")) == " = Valid = \n text \n"
    assert load_text(str(folder / "wiki.test.raw")) == " = Test = \n text \n"
    rows = load_rows(str(folder / "lambada_test.jsonl"))
    assert rows == ROWS["EleutherAI/lambada_openai", "test"]
    first = (folder / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first) == {"text": rows[0]}


def test_a_hub_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    def load_dataset(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr(sys, "argv", ["fetch_texts", "--save", str(tmp_path)])
    with pytest.raises(UserError, match="Salesforce/wikitext cannot be had"):
        fetch_texts.main()
