"""Greedy search against transformers: ends of text, lengths, penalties, streams, a golden text."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import torch
import transformers
from conftest import FAMILIES, examples, tiny
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    assert_tokens_equal,
    bundled,
    cut,
    draw_prompts,
    load,
    our_bundled,
    random_model,
    reference,
    save,
)
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    RepetitionPenaltyLogitsProcessor,
)

from qllm.checkpoint.reader import read_raw_config
from qllm.errors import UserError
from qllm.generate import (
    DEFAULT_NEW_TOKENS,
    NOT_APPLIED,
    GenerationConfig,
    LogitsProcessor,
    TextStream,
    check_prompts,
    generate,
    read_generation_config,
)
from qllm.huggingface import reference_generate
from qllm.models import read_config
from qllm.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers warns of lengths that contradict each other; here they are meant to.
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

VOCAB = 60
SMALL = {
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=36, n_head=6, n_layer=2),
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
}


# Older versions of transformers take the pads in front of a prompt for words it has said.
PENALTY_SKIPS_PADS = "prompt_ignore_length" in inspect.getsource(transformers.generation.utils)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of each family a small random model: ours, and transformers'."""
    models = {}
    for family, config in SMALL.items():
        theirs = random_model(config, seed=3)
        models[family] = save(theirs, tmp_path_factory.mktemp(family)), theirs
    return models


@given(data=st.data())
@examples(60)
def test_settings_mean_what_they_mean_in_transformers(small, data):
    """Ends of text in a batch, shortest and longest lengths, repetition penalty, all at once."""
    ours, theirs = small[data.draw(st.sampled_from(FAMILIES))]
    penalty = data.draw(st.sampled_from([1.0, 1.0, 0.7, 1.2, 3.0]))
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=5))
    if penalty != 1 and not PENALTY_SKIPS_PADS:
        lengths = [lengths[0]] * len(lengths)
    prompts = draw_prompts(lengths, VOCAB, data.draw(st.integers(0, 1000)))
    # A pad that the model likes to say shows whether it is counted as said.
    pad = data.draw(st.integers(0, VOCAB - 1))
    wishes = {}
    if data.draw(st.booleans()):
        wishes["max_new_tokens"] = data.draw(st.integers(1, 16))
    else:
        wishes["max_length"] = max(lengths) + data.draw(st.integers(1, 16))
    if penalty != 1:
        wishes["repetition_penalty"] = penalty
    free = reference(theirs, prompts, pad=pad, **wishes)
    said = sorted({token for row in free.tokens for token in row})
    eos = data.draw(st.lists(st.sampled_from(said), max_size=3, unique=True))
    eos += data.draw(st.sampled_from([[], [VOCAB + 3]]))
    if data.draw(st.booleans()):
        wishes["min_length"] = data.draw(st.integers(0, 30))
    if data.draw(st.booleans()):
        wishes["min_new_tokens"] = data.draw(st.integers(1, 12))
    config = GenerationConfig(**wishes, eos_token_ids=tuple(eos))
    assert_tokens_equal(
        generate(ours, prompts, config), reference(theirs, prompts, eos, pad, **wishes)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_default_number_of_new_tokens(small, family):
    ours, theirs = small[family]
    prompts = draw_prompts([3, 5], VOCAB)
    got = generate(ours, prompts, GenerationConfig())
    assert_tokens_equal(got, reference(theirs, prompts))
    assert [len(row) for row in got] == [DEFAULT_NEW_TOKENS] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_text_inside_a_batch(family, monkeypatch):
    """A row that has ended ends with its end of text, and is computed no more; the others say what
    they say without it."""
    model = our_bundled(family)
    prompts = draw_prompts([5, 1, 33, 12, 60, 2, 20, 7], 4096, seed=1)
    free = generate(model, prompts, GenerationConfig(max_new_tokens=24))
    # Tokens that one row says, and no other.
    rows = [set(row) for row in free]
    rare = [row - set().union(*rows[:i], *rows[i + 1 :]) for i, row in enumerate(rows)]
    eos = {sorted(row, key=free[i].index)[len(row) // 2] for i, row in enumerate(rare[:6]) if row}
    config = GenerationConfig(max_new_tokens=24, eos_token_ids=tuple(eos))
    seen, computed, decode = [[] for _ in prompts], [], model.decode
    monkeypatch.setattr(
        model,
        "decode",
        lambda tokens, *a, **k: computed.append(len(tokens)) or decode(tokens, *a, **k),
    )
    got = generate(model, prompts, config, lambda *event: seen[event[0]].append(event[1:]))
    assert got == [cut(row, eos) for row in free]
    # Each token is told of, and of the last one that it is.
    assert seen == [[(token, i == len(row)) for i, token in enumerate(row, 1)] for row in got]
    assert computed == [sum(len(row) > step for row in got) for step in range(1, 24)]
    assert len({len(row) for row in got}) > 3  # they end at different times
    assert 24 in {len(row) for row in got}
    assert_tokens_equal(got, reference(bundled(family), prompts, list(eos), max_new_tokens=24))


def test_generation_stops_when_every_row_has_ended(small):
    ours, _ = small["opt"]
    prompts = draw_prompts([4, 9], VOCAB)
    free = generate(ours, prompts, GenerationConfig(max_new_tokens=9))
    passes = []
    ours.final_norm.register_forward_hook(lambda *_: passes.append(1))
    config = GenerationConfig(max_new_tokens=9, eos_token_ids=(free[0][0], free[1][1]))
    rows = generate(ours, prompts, config)
    assert len(passes) == max(map(len, rows)) <= 2


@pytest.mark.parametrize("penalty", [0.5, 1.8])
def test_repetition_penalty_of_every_logit(small, penalty):
    """Of negative ones too, which greedy search hardly ever chooses from."""
    prompts, said = draw_prompts([6, 6], VOCAB), torch.tensor([3, 50])
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    config = GenerationConfig(repetition_penalty=penalty)
    processor = LogitsProcessor(small["opt"][0], prompts, config)
    processor.add(said)
    ids = torch.cat([torch.tensor(prompts), said[:, None]], dim=1)
    want = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert torch.equal(processor(logits), want)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_an_end_of_text_that_is_no_token_forbids_none(small, token):
    config = GenerationConfig(min_new_tokens=3, eos_token_ids=(token,))
    logits = torch.arange(float(VOCAB))[None]
    assert torch.equal(LogitsProcessor(small["opt"][0], [[1]], config)(logits), logits)


def test_no_tokens_wanted(small):
    assert generate(small["opt"][0], [[1], [2, 3]], GenerationConfig(max_new_tokens=0)) == [[], []]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_of_the_bundled_models_equals_the_reference(family):
    """The whole way from text to text, with a prompt that is cut from the left."""
    prompts = ["He is working on", "The", "Once upon a time there was a small 🐟, and", "a " * 60]
    folder = tiny(family)
    tokenizer = Tokenizer.load(folder)
    want = reference_generate(
        folder, prompts, max_prompt_length=24, max_new_tokens=30, dtype=torch.float32
    )
    ids = [tokenizer.encode(prompt, 24) for prompt in prompts]
    model = our_bundled(family)
    config = read_generation_config(folder, model.config)
    assert config.eos_token_ids == (2,)
    got = generate(model, ids, GenerationConfig(30, eos_token_ids=config.eos_token_ids))
    assert got == want.tokens
    texts = [tokenizer.continuation(*pair) for pair in zip(ids, got, strict=True)]
    assert texts == want.texts
    assert want.layers == 6
    assert want.seconds > 0
    assert want.bytes == pytest.approx(sum(tensor.nbytes for tensor in model.buffers()), rel=1e-4)


def test_reference_refuses_our_own_layout(tmp_path):
    shutil.copytree(tiny("opt"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"qllm_layout": 1}))
    with pytest.raises(UserError):
        reference_generate(tmp_path, ["a"], max_prompt_length=4, max_new_tokens=1)


def test_reference_says_what_transformers_cannot_load(tmp_path):
    shutil.copytree(tiny("opt"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot read the tokenizer"):
        reference_generate(tmp_path, ["a"], max_prompt_length=4, max_new_tokens=1)


# generation_config.json: what is in it, and what config.json says beside it.
FILES = {
    "none": (None, {"eos_token_id": "said"}),
    "none, and a list": (None, {"eos_token_id": ["said"]}),
    "empty": ({}, {"eos_token_id": "said"}),
    "one": ({"eos_token_id": "said"}, {"eos_token_id": 2}),
    "list": ({"eos_token_id": [58, "said"]}, {"eos_token_id": 2}),
    "null": ({"eos_token_id": None}, {"eos_token_id": "said"}),
    "no such token": ({"eos_token_id": [-1, 9999, "said"], "min_length": 20}, {}),
    "lengths": ({"eos_token_id": "said", "min_length": 20, "max_length": 30}, {}),
    "new tokens": ({"eos_token_id": "said", "min_new_tokens": 5, "max_new_tokens": 9}, {}),
    "penalty": ({"eos_token_id": "said", "repetition_penalty": 1.5, "pad_token_id": 4}, {}),
    "in config.json": (
        None,
        {"repetition_penalty": 1.5, "min_length": 14, "max_length": 21, "eos_token_id": ["said"]},
    ),
    "not in config.json": ({"max_new_tokens": 5}, {"repetition_penalty": 1.5, "max_length": 12}),
    "nothing said": ({"repetition_penalty": 1.0, "min_length": 0, "max_length": None}, {}),
}


@pytest.mark.parametrize("limit", [{}, {"max_new_tokens": 7}], ids=["own length", "7 tokens"])
@pytest.mark.parametrize("name", FILES)
def test_generation_config_is_read_as_transformers_reads_it(name, limit, tmp_path):
    theirs = random_model(SMALL["llama"], seed=3)
    prompts = draw_prompts([11, 4, 8], VOCAB, seed=5)
    said = reference(theirs, prompts).tokens[1][2]
    file, changes = json.loads(json.dumps(FILES[name]).replace('"said"', str(said)))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    path = tmp_path / "generation_config.json"
    path.unlink()
    if file is not None:
        path.write_text(json.dumps(file))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    want = reference(theirs, prompts, eos=None, **limit)
    notes = []
    config = read_generation_config(tmp_path, read_config(read_raw_config(tmp_path)), notes.append)
    config = GenerationConfig(**{**vars(config), **limit})
    assert_tokens_equal(generate(load(tmp_path), prompts, config), want)
    assert notes == []


@pytest.mark.parametrize("key", NOT_APPLIED)
def test_settings_that_are_not_applied_are_named(key, tmp_path):
    config = read_config(read_raw_config(tiny("opt")))
    path, notes = tmp_path / "generation_config.json", []
    for neutral in (None, NOT_APPLIED[key]):
        path.write_text(json.dumps({key: neutral}))
        read_generation_config(tmp_path, config, notes.append)
        assert notes == []
    path.write_text(json.dumps({key: 3}))
    read_generation_config(tmp_path, config, notes.append)
    assert notes == [f"generation_config.json sets {key}, which QLLM does not apply"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [1, None]}, "a token id or a list of them"),
        ({"max_length": -4}, "max_length is -4"),
        ({"min_new_tokens": 2.5}, "min_new_tokens is 2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": "strong"}, "a positive number"),
    ],
)
def test_impossible_settings_are_refused(values, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        read_generation_config(tmp_path, read_config(read_raw_config(tiny("opt"))))


@pytest.mark.parametrize(
    ("prompts", "wishes", "message"),
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1, 4096]], {}, "prompt 1 has the token id 4096; the model's vocabulary ends at 4095"),
        ([[5], [-1]], {}, "prompt 2 has the token id -1"),
        ([[1] * 500], {"max_new_tokens": 13}, "500 tokens and 13 new ones exceed .* 512"),
        ([[1] * 9], {"max_length": 9}, "9 tokens leaves nothing to generate: max_length"),
    ],
)
@pytest.mark.parametrize("check", [check_prompts, generate])
def test_impossible_prompts_are_refused(check, prompts, wishes, message):
    model, config = our_bundled("llama"), GenerationConfig(**wishes)
    with pytest.raises(UserError, match=message):
        if check is generate:
            generate(model, prompts, config)
        else:
            check_prompts(model.config, prompts, config)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_window_can_be_filled_to_the_end(family):
    model, prompts = our_bundled(family), draw_prompts([508, 2], 4096)
    got = generate(model, prompts, GenerationConfig(max_new_tokens=4))
    assert_tokens_equal(got, reference(bundled(family), prompts, max_new_tokens=4))


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
    got = generate(model, prompts, GenerationConfig(max_new_tokens=20), stream.add)
    texts = [tokenizer.continuation(*pair) for pair in zip(prompts, got, strict=True)]
    assert ["".join(record.pieces[row]) for row in range(3)] == texts
    assert all(texts)


def test_golden_text():
    """One text, as it has always been: bundled BLOOM at 4 bits."""
    tokenizer, model = Tokenizer.load(tiny("bloom")), our_bundled("bloom", "4")
    prompt = tokenizer.encode("The film was")
    (tokens,) = generate(model, [prompt], GenerationConfig(max_new_tokens=24))
    assert tokenizer.continuation(prompt, tokens) == (
        " a species of small sea snail, marine gastropod mollusk in the family Costellariidae, "
        "the ribbed miters."
    )


@pytest.mark.parametrize("prompts", [[10], [12, 3], [13, 2], [4, 11, 7]])
def test_phi3_reads_a_text_anew_that_outgrows_its_short_factors(prompts, tmp_path):
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0, 2.0, 1.5],
        "long_factor": [4.0, 1.0, 9.0],
    }
    config = Phi3Config(
        vocab_size=90,
        hidden_size=24,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=40,
        max_position_embeddings=40,
        original_max_position_embeddings=12,
        rope_parameters=rope,
        pad_token_id=None,
    )
    theirs = random_model(config)
    ours = save(theirs, tmp_path)
    ids = draw_prompts(prompts, 90)
    got = generate(ours, ids, GenerationConfig(max_new_tokens=9))
    assert_tokens_equal(got, reference(theirs, ids, max_new_tokens=9))
