"""Text that is written as it is generated."""

from __future__ import annotations

import pytest
import tokenizer_files
from conftest import FAMILIES, tiny
from oracle import (
    our_bundled,
)

from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.stopping import StopStrings
from qllm.stream import TextStream
from qllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class Recorder:
    """What a stream begins and writes, in order."""

    def __init__(self) -> None:
        self.events: list[int | str] = []
        self.pieces: dict[int, list[str]] = {}

    def begin(self, row: int) -> None:
        self.row = row
        self.pieces[row] = []

    def write(self, piece: str) -> None:
        self.pieces[self.row].append(piece)


EOS = 2
TEXTS = [
    " a fish 🐟🐠 and a family 👨‍👩‍👧 in naïve Zürich",
    " 日本語のテキスト, Ελληνικά, עברית",
    "",
    "\n\n  two spaces\tand a tab ",
    "🙂",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_stream_writes_whole_characters_one_prompt_after_the_other(family):
    tokenizer = Tokenizer.load(tiny(family))
    prompts = [tokenizer.encode(f"Prompt {i}: 🦊") for i in range(len(TEXTS))]
    rows = [[*tokenizer.encode(text), EOS] for text in TEXTS]
    assert len(rows[0]) > 2 * len(TEXTS[0].split())  # its emoji are several tokens each
    record = Recorder()
    stream = TextStream(tokenizer, prompts, record.begin, record.write)
    for step in range(max(map(len, rows))):
        for row, tokens in enumerate(rows):
            if step < len(tokens):
                stream.add(row, tokens[step], step == len(tokens) - 1)
        so_far = "".join(record.pieces[0])
        if step < len(rows[0]) - 1:
            assert list(record.pieces) == [0]
            assert TEXTS[0].startswith(so_far)
        # At most the bytes of one character wait.
        known = tokenizer.continuation(prompts[0], rows[0][: step + 1]).rstrip("\ufffd")
        assert so_far == known
    assert len(record.pieces[0]) > 10
    assert ["".join(record.pieces[row]) for row in range(len(TEXTS))] == TEXTS
    for pieces in record.pieces.values():
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("before", ["", "日本語", "the"])
def test_characters_of_single_bytes_stay_whole(before, tmp_path):
    """However many bytes stand next to each other, which such a vocabulary decodes together."""
    tokenizer = Tokenizer.load(tokenizer_files.write(tmp_path, "llama", {}))
    text = before + "のテキスト👩\u200d👩\u200d👧 in the rain"
    tokens = tokenizer.encode(text)
    prompt, tokens = tokens[: tokenizer.count(before)], tokens[tokenizer.count(before) :]
    assert tokenizer.decode(prompt) == before and sum(map(tokenizer.is_byte, tokens)) > 30
    record = Recorder()
    stream = TextStream(tokenizer, [prompt], record.begin, record.write)
    for i, token in enumerate(tokens):
        stream.add(0, token, i == len(tokens) - 1)
        known = tokenizer.continuation(prompt, tokens[: i + 1])
        assert "".join(record.pieces[0]) == known or known.endswith("\ufffd")
    assert before + "".join(record.pieces[0]) == text
    for string in ("ト", "スト👩", "\u200d👧", "👧 i", "rain"):
        stops = StopStrings(tokenizer, [prompt], [string])
        end = next(i for i, token in enumerate(tokens) if stops(0, token))
        known = [tokenizer.continuation(prompt, tokens[:size]) for size in (end, end + 1)]
        assert [string in each for each in known] == [False, True]


def test_stream_goes_on_to_the_next_prompt_when_one_has_ended():
    tokenizer = Tokenizer.load(tiny("bloom"))
    record = Recorder()
    stream = TextStream(tokenizer, [[5], [6]], record.begin, record.write)
    hello, world = (tokenizer.encode(text)[0] for text in (" hello", " world"))
    stream.add(0, EOS, True)
    assert list(record.pieces) == [0, 1]
    stream.add(1, hello, False)
    assert "".join(record.pieces[1]) == tokenizer.decode([hello])
    stream.add(1, world, True)
    assert "".join(record.pieces[1]) == tokenizer.decode([hello, world])


def test_stream_ends_with_what_is_no_character():
    """A text that breaks off inside a character ends as its decoded form does."""
    tokenizer = Tokenizer.load(tiny("bloom"))
    prompt, fish = tokenizer.encode("a"), tokenizer.encode("b🐟")[:-1]
    record = Recorder()
    stream = TextStream(tokenizer, [prompt], record.begin, record.write)
    for token in fish[:-1]:
        stream.add(0, token, False)
    assert "".join(record.pieces[0]) == "b"
    stream.add(0, fish[-1], True)
    assert "".join(record.pieces[0]) == tokenizer.continuation(prompt, fish) == "b\ufffd"


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_text_is_the_final_text(family):
    tokenizer, model = Tokenizer.load(tiny(family)), our_bundled(family)
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "The 🐟", "She said")]
    record = Recorder()
    stream = TextStream(tokenizer, prompts, record.begin, record.write)
    decode, longest = tokenizer.decode, []
    tokenizer.decode = lambda ids: longest.append(len(ids)) or decode(ids)
    got = generate(model, prompts, GenerationConfig(max_new_tokens=80), stream.add)
    # What was written is not decoded again; rows that have waited are decoded as a whole.
    assert sum(length > 40 for length in longest) < 3 * len(prompts)
    texts = [tokenizer.continuation(*pair) for pair in zip(prompts, got, strict=True)]
    assert ["".join(record.pieces[row]) for row in range(3)] == texts
    assert all(texts)
