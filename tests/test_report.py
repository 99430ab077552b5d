"""What the scripts print: tables, JSON, where two token lists part."""

from __future__ import annotations

import json
import math

import pytest
from conftest import tiny
from hypothesis import given
from hypothesis import strategies as st

from qllm import report
from qllm.report import finite, first_difference, table_lines
from qllm.tokenizer import Tokenizer


def test_numbers_that_json_lacks_become_null():
    value = {"a": [1.5, math.inf, {"b": math.nan}], "c": "inf", "d": 3, "e": None}
    expected = {"a": [1.5, None, {"b": None}], "c": "inf", "d": 3, "e": None}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == expected


def test_a_table_is_aligned_markdown():
    assert table_lines(["a", "long"], [["wide cell", "1"], ["", "22"]]) == [
        "| a         | long |",
        "| --------- | ---- |",
        "| wide cell | 1    |",
        "|           | 22   |",
    ]


@pytest.mark.parametrize(
    ("tokens", "reference", "index"),
    [
        ([], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([4, 2], [1, 2], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([], [1], 0),
    ],
)
def test_first_difference(tokens, reference, index):
    assert first_difference(tokens, reference) == index


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_first_difference_is_the_first(tokens, reference):
    index = first_difference(tokens, reference)
    assert index == first_difference(reference, tokens)
    assert (index is None) == (tokens == reference)
    if index is not None:
        assert tokens[:index] == reference[:index]
        assert tokens[index : index + 1] != reference[index : index + 1]


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        (0, 6, "layers 0-5"),
        (0, 0.5, "attention of layer 0"),
        (0.5, 1, "MLP of layer 0"),
        (2.5, 5.5, "MLP of layer 2, layers 3-4, attention of layer 5"),
    ],
)
def test_ranges_of_halves_of_layers(begin, end, words):
    assert report.layer_range(begin, end) == words


def test_a_token_that_nobody_sees_has_its_number():
    tokenizer = Tokenizer.load(tiny("opt"))
    assert report.token_text(tokenizer, 2) == '"" (id 2)'
    (the,) = tokenizer.encode(" the")[-1:]
    assert report.token_text(tokenizer, the) == '" the"'
