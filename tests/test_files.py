"""Files that were made to hang or to fill memory: refused before anything is read of them."""

from __future__ import annotations

import os
import socket

import pytest
from checkpoints import copy_of

from qllm.calibration import Calibration
from qllm.checkpoint.reader import Checkpoint
from qllm.errors import UserError
from qllm.files import open_file, parse_json, read_bytes
from qllm.patterns import Patterns
from qllm.tokenizer import Tokenizer


def pipe(path):
    os.mkfifo(path)


def endless(path):
    path.symlink_to("/dev/zero")


def bound_socket(path):
    here = socket.socket(socket.AF_UNIX)
    here.bind(str(path))
    here.close()


KINDS = {
    "a named pipe": pipe,
    "a device": endless,
    "a folder": lambda path: path.mkdir(),
    "cannot be read": bound_socket,
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("what", KINDS)
def test_what_is_no_file(what, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may have some hundred characters
    folder = copy_of("opt", tmp_path / "m")
    (folder / name).unlink()
    KINDS[what]((folder / name).relative_to(tmp_path))
    read = Tokenizer.load if name == "tokenizer.json" else Checkpoint
    with pytest.raises(UserError, match=rf"{name}.* {what}"):
        read(folder)


def test_a_calibration_that_is_a_pipe(tmp_path):
    pipe(tmp_path / "calib")
    with pytest.raises(UserError, match="a named pipe"):
        Calibration.load(tmp_path / "calib")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "x").touch(mode=0)
    with pytest.raises(UserError, match="cannot be read"):
        open_file(tmp_path / "x")


def test_a_file_is_read_to_a_bound(tmp_path):
    (tmp_path / "x").write_bytes(bytes(9))
    assert read_bytes(tmp_path / "x", 9) == bytes(9)
    with pytest.raises(UserError, match="more than"):
        read_bytes(tmp_path / "x", 8)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "", "\ud800"])
def test_json_that_python_cannot_read(text):
    with pytest.raises(UserError, match="it cannot be read as JSON"):
        parse_json(text, "it")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.+)+(.+)+(.+)+(?<=!)",
        r"((((a{100}){100}){100}){100}){100}",
        "x" * 20_000,
        "(" * 2000 + ")" * 2000,
        "(",
    ],
)
def test_patterns_that_would_take_forever(pattern, monkeypatch):
    monkeypatch.setattr("qllm.patterns.SECONDS", 0.2)
    with pytest.raises(UserError, match=r"it: .*(no regular expression|takes too long)"):
        Patterns("it").search(pattern, "model.layers.0." * 40)


@pytest.mark.parametrize("pattern", [r"(([a-z_0-9])+\.?)+$X", r"(\w+\.?)+!"])
def test_patterns_that_re_takes_forever_for(pattern):
    assert not Patterns("it").search(pattern, "model.layers.0." + "a" * 40 + "?!X?")


def test_many_patterns_share_their_time(monkeypatch):
    monkeypatch.setattr("qllm.patterns.SECONDS", 0.05)
    patterns = Patterns("it")
    with pytest.raises(UserError, match="takes too long"):
        for number in range(100_000):
            patterns.search(f"layers.{number}", "model.layers.0")


def test_patterns_are_those_of_re():
    name = "model.layers.10.self_attn.q_proj"
    for pattern, found in (
        (r"layers\.1\d{0,1}\.", (True, False, False)),
        (r"^(?!.*experts).*q_proj$", (True, True, True)),
        (r"(?i)MODEL", (True, True, False)),
        (r"k_proj", (False, False, False)),
    ):
        patterns = Patterns("it")
        looks = (patterns.search, patterns.match, patterns.fullmatch)
        assert tuple(look(pattern, name) for look in looks) == found
