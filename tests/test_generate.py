"""Greedy generation, token for token what transformers says."""

from __future__ import annotations

import inspect
import json
import shutil

import pytest
import torch
import transformers
from conftest import FAMILIES, examples, tiny
from generating import SMALL, VOCAB
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    assert_tokens_equal,
    bundled,
    cut,
    draw_prompts,
    not_by_older,
    our_bundled,
    random_model,
    reference,
    save,
)
from transformers import (
    Phi3Config,
    RepetitionPenaltyLogitsProcessor,
)

from qllm.errors import UserError
from qllm.generate import LogitsProcessor, NewTokens, generate
from qllm.generation_config import DEFAULT_NEW_TOKENS, GenerationConfig, read_generation_config
from qllm.huggingface import reference_generate
from qllm.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # transformers warns of lengths that contradict each other; here they are meant to.
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

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
    ahead = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qllm.generate.computes_ahead", lambda device: ahead)
        got = generate(ours, prompts, config)
    assert_tokens_equal(got, reference(theirs, prompts, eos, pad, **wishes))


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
    computed.clear()
    assert generate(model, prompts, config, batch_size=3) == got
    assert max(computed) == 3  # and no more at once
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


def test_a_gpu_is_given_the_next_step_while_it_computes_one(small, monkeypatch):
    """But not at first; that a row has ended is found out a step later, which it is left out of."""
    ours, _ = small["opt"]
    prompts, config = draw_prompts([4, 9], VOCAB), GenerationConfig(max_new_tokens=9)
    free = generate(ours, prompts, config)
    done, decode, read = [], ours.decode, NewTokens.tolist

    def noted_decode(tokens, *arguments, **options):
        done.append(len(tokens))
        return decode(tokens, *arguments, **options)

    monkeypatch.setattr(ours, "decode", noted_decode)
    monkeypatch.setattr(NewTokens, "tolist", lambda found: done.append("read") or read(found))
    monkeypatch.setattr("qllm.generate.computes_ahead", lambda device: True)
    first = []  # the first prompt's tokens

    def stop(row, token):
        first.extend([token] if row == 0 else [])
        return row == 0 and len(first) == 5

    assert generate(ours, prompts, config, stop=stop) == [free[0][:5], free[1]]
    waited_for = ["read", 2, "read", 2, "read"]
    assert done == [*waited_for, 2, 2, "read", 2, "read", 1, "read", 1, "read", 1, "read", "read"]


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


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_window_can_be_filled_to_the_end(family):
    model, prompts = our_bundled(family), draw_prompts([508, 2], 4096)
    got = generate(model, prompts, GenerationConfig(max_new_tokens=4))
    assert_tokens_equal(got, reference(bundled(family), prompts, max_new_tokens=4))


def test_golden_text():
    """One text, as it has always been: bundled BLOOM at 4 bits."""
    tokenizer, model = Tokenizer.load(tiny("bloom")), our_bundled("bloom", "4")
    prompt = tokenizer.encode("The film was")
    (tokens,) = generate(model, [prompt], GenerationConfig(max_new_tokens=24))
    assert tokenizer.continuation(prompt, tokens) == (
        " a species of small sea snail, marine gastropod mollusk in the family Costellariidae, "
        "the ribbed miters."
    )


@not_by_older
@pytest.mark.parametrize("prompts", [[10], [12, 3], [13, 2], [4, 11, 7]])
def test_phi3_reads_a_text_anew_that_outgrows_its_short_factors(prompts, tmp_path):
    """Each by its own length, whatever is in the batch beside it."""
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
