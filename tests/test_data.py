"""Text for calibration: files in their forms, names, and windows of tokens."""

from __future__ import annotations

import json
import random

import pytest

from qllm import text
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
    "line",
    [
        *("no json", "[]", '"text"', "{}", '{"text": 7}', '{"text": null}', '{"text": ["a"]}'),
        *("[" * 100_000, f'{{"text": {"9" * 5000}}}'),
    ],
    ids=range(9),
)
def test_rows_without_text(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    message = r'rows\.jsonl: each line of a JSON-lines file is {"text": "…"}; line 2 is not'
    with pytest.raises(UserError, match=message):
        load_text(str(path))


@pytest.mark.parametrize(("data", "message"), [(b"", "no text"), (b" \n\t\n", "no text")])
def test_files_without_text(data, message, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        load_text(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text".encode("utf-16"), r"text\.txt is UTF-16, .* `iconv -f UTF-16 -t UTF-8` converts"),
        ("text".encode("utf-16-le"), r"text\.txt is UTF-16, "),
        ("text".encode("utf-32"), r"text\.txt is UTF-32, "),
        (b"one\ntwo\nna\xefve\n", r"text\.txt is not UTF-8 text: line 3 has the byte 0xef"),
        (b"half a pair: \xed\xa0\xbd", r"is not UTF-8 text: line 1 has the byte 0xed"),
        (b"cut off \xf0\x9f", r"is not UTF-8 text: line 1 has the byte 0xf0"),
    ],
)
def test_a_file_that_is_no_text(data, message, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    for load in (load_text, load_rows):
        with pytest.raises(UserError, match=message):
            load(str(path))


def test_no_more_than_a_text_is_read(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    with path.open("wb") as file:
        file.truncate(100 << 30)  # of which the disk holds nothing
    monkeypatch.setattr(text, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"text\.txt has more than .* `head -c .* takes a part"):
        load_text(str(path))


def test_marks_and_line_ends_are_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert load_text(str(path)) == "one\ntwo\nthree\n"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n{"text": "two"}\r\n')
    assert load_rows(str(path)) == ["one\r\n", "two"]
    assert load_text(str(path)) == "one\r\n\n\ntwo"


def test_a_row_with_half_a_surrogate_pair(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"line 3 holds '\\ud83d', half a surrogate pair"):
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


def test_a_set_out_of_reach_leaves_the_hub_to_others(monkeypatch):
    import datasets
    from huggingface_hub import HfApi, constants

    asked = []

    def dataset_info(self, repository, timeout):
        raise TimeoutError("it does not answer")

    def load_dataset(*args, **options):
        asked.append(constants.HF_HUB_OFFLINE)  # so that it looks in its cache alone
        raise FileNotFoundError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="cannot be had \\(it does not answer\\)"):
        load_text("ptb")
    assert asked == [True]
    assert not constants.HF_HUB_OFFLINE


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
    with pytest.raises(UserError, match=f"`tasks` 'x' is neither a file nor .* {', '.join(TASKS)}"):
        load_rows("x")


def test_c4_is_judged_by_as_many_rows_as_gptq_takes(monkeypatch):
    import datasets

    rows = [str(number) for number in range(1200)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"text": rows})
    assert load_text("c4", "evaluation") == " ".join(rows[:1100])
    assert load_text("c4") == " ".join(rows)
