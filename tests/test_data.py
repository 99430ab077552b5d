"""Text for calibration: files in their forms, names, and windows of tokens."""

from __future__ import annotations

import json
import random

import pytest

from qllm.data import DATASETS, TASKS, load_rows, load_text, sample_windows
from qllm.errors import UserError


def test_a_text_file_is_its_text(tmp_path):
    path = tmp_path / "text.txt"
    text = "One line.\nAnother, with ünïcode\u2028and a separator.\n"
    path.write_text(text, encoding="utf-8")
    assert load_text(str(path)) == text


def test_json_lines_are_joined(tmp_path):
    """Line separators of Unicode may stand in a JSON string; only a line feed ends a row."""
    rows = ["first", "second\nline", "with \u2028 and \x85 inside", "last"]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": row, "id": 1}, ensure_ascii=False) for row in rows]
    path.write_text("\r\n".join([*lines, "", " "]), encoding="utf-8", newline="")
    assert load_text(str(path)) == "\n\n".join(rows)


@pytest.mark.parametrize(
    "line", ["no json", "[]", '"text"', "{}", '{"text": 7}', '{"text": null}', '{"text": ["a"]}']
)
def test_rows_without_text(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError, match=r'rows\.jsonl: each line of a JSON-lines file is {"text"'):
        load_text(str(path))


@pytest.mark.parametrize(("data", "message"), [(b"", "no text"), (b" \n\t\n", "no text")])
def test_files_without_text(data, message, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_text(str(path))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(UserError, match=r"text\.txt cannot be read as UTF-8"):
        load_text(str(path))


@pytest.mark.parametrize("name", ["no-such-file.txt", "wikitext", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(UserError, match="neither a file nor one of wikitext2, c4, ptb, pile-10k"):
        load_text(name)


def test_named_sets_take_different_parts_to_judge_by(monkeypatch):
    """A named set is asked of `datasets` by its repository, and its rows are joined."""
    import datasets

    asked = []

    def load_dataset(repository, config, *, data_files, split):
        asked.append((repository, split))
        return {DATASETS["wikitext2"].column: ["a", "b"]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_text("wikitext2") == load_text("wikitext2", "evaluation") == "a\n\nb"
    assert asked == [("Salesforce/wikitext", "train"), ("Salesforce/wikitext", "test")]


def test_windows_are_runs_of_the_text():
    ids = list(range(1000))
    windows = sample_windows(ids, 50, 20, seed=3)
    assert len(windows) == 50
    for window in windows:
        assert window == ids[window[0] : window[0] + 20]
    assert len({window[0] for window in windows}) > 30
    assert windows == sample_windows(ids, 50, 20, seed=3) != sample_windows(ids, 50, 20, seed=4)


def test_a_draw_touches_no_other_random_numbers():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    sample_windows(list(range(100)), 5, 10, seed=1)
    assert random.random() == expected


def test_the_first_and_the_last_window_can_be_drawn():
    assert sample_windows([1, 2, 3], 4, 3, seed=0) == [[1, 2, 3]] * 4
    starts = {window[0] for window in sample_windows(list(range(5)), 100, 3, seed=0)}
    assert starts == {0, 1, 2}


def test_a_text_that_is_too_short():
    with pytest.raises(UserError, match="the text has 5 tokens, one sample takes 6"):
        sample_windows([1, 2, 3, 4, 5], 1, 6, seed=0)


def test_rows_of_a_task(tmp_path):
    rows = ["first of them", "second\nline", "with \u2028 inside"]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows) + "\n\n")
    assert load_rows(str(path)) == rows


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "there are no rows in it"),
        ("no json", "each line of a JSON-lines file"),
        ('{"word": "a"}', "each line of a JSON-lines file"),
        ('{"text": ["a"]}', "each line of a JSON-lines file"),
    ],
)
def test_files_that_are_no_task(data, message, tmp_path):
    (tmp_path / "task").write_text(data)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / "task"))


def test_an_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match=f"--tasks 'x' is neither a file nor .* {', '.join(TASKS)}"):
        load_rows("x")


def test_c4_is_judged_by_as_many_rows_as_gptq_takes(monkeypatch):
    import datasets

    rows = [str(number) for number in range(1200)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"text": rows})
    assert load_text("c4", "evaluation") == " ".join(rows[:1100])
    assert load_text("c4") == " ".join(rows)
