"""Drawing tokens: transformers' processors are the oracle, and a seed gives one text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, examples, tiny
from covering import slow_but
from hypothesis import given
from hypothesis import strategies as st
from inside import call
from oracle import draw_prompts, load, our_bundled
from transformers.generation import logits_process as theirs

from qllm import LLM
from qllm.errors import UserError
from qllm.generate import generate
from qllm.generation_config import GenerationConfig, read_sampling
from qllm.sampling import Sampler, Sampling
from qllm.stopping import settled

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = draw_prompts([5, 1, 9, 3], 4096)
DRAWN = Sampling(temperature=1.3, top_k=40, top_p=0.9, seed=7)


def processors(sampling: Sampling) -> theirs.LogitsProcessorList:
    """As `GenerationMixin._get_logits_processor` puts them together."""
    found = []
    if sampling.temperature != 1:
        found.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        found.append(theirs.MinPLogitsWarper(sampling.min_p))
    return theirs.LogitsProcessorList(found)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-31, 1e-5])
def test_the_least_temperatures_draw_the_likeliest(temperature):
    logits = torch.tensor([[-60000.0, 3.0, -torch.inf, 60000.0], [1.0, 2.0, 1.999, 0.0]])
    for seed in range(5):
        drawn = Sampler(Sampling(temperature, seed=seed), [seed, seed])(logits)
        assert drawn.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nothing_is_drawn_from_logits_that_are_no_numbers(wrong):
    with pytest.raises(UserError, match=r"logits are infinite or NaN.*dtype"):
        Sampler(DRAWN, [1])(torch.tensor([[0.0, wrong, 1.0]]))


@given(
    temperature=st.one_of(st.just(1.0), st.floats(0.1, 4.0)),
    top_k=st.integers(0, 60),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.none(), st.floats(0.0, 1.0)),
    size=st.integers(1, 50),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
@examples(100)
def test_scores_are_those_of_transformers(temperature, top_k, top_p, min_p, size, ties, seed):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * 4
    logits = logits.round() if ties and top_p == 1 else logits  # who wins a tie there is chance
    logits[1, : size // 2] = -torch.inf  # what min_new_tokens may leave
    want = processors(sampling)(None, logits.clone())
    assert torch.equal(sampling.scores(logits), want)


def test_tokens_come_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0, -1.0]])
    sampler = Sampler(Sampling(top_k=0), [1])
    drawn = torch.cat([sampler(logits) for _ in range(4000)])
    found = drawn.bincount(minlength=5) / len(drawn)
    assert found[2] == 0
    torch.testing.assert_close(found, logits[0].softmax(0), atol=0.02, rtol=0)


@pytest.mark.parametrize(("family",), slow_but([("llama",)], FAMILIES))
def test_a_seed_gives_a_prompt_one_text(family):
    """Alone, beside others that end before it, in shards; a prompt that comes again has another."""
    model, config = our_bundled(family, "4"), GenerationConfig(12, sampling=DRAWN)
    together = generate(model, PROMPTS, config)
    assert len(set(map(tuple, together))) == len(PROMPTS)
    alone = [generate(model, [prompt], config)[0] for prompt in PROMPTS]
    assert together == alone
    eos = tuple(row[3] for row in together[:2])
    ended = generate(model, PROMPTS, GenerationConfig(12, sampling=DRAWN, eos_token_ids=eos))
    assert [row == want[: len(row)] for row, want in zip(ended, together, strict=True)] == [
        True
    ] * 4
    assert generate(load(tiny(family), "4", num_shards=3), PROMPTS, config) == together
    twice = generate(model, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], config)
    assert twice[:2] == together[:2] and twice[2] != twice[0]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert generate(model, prompts, config, batch_size=2) == twice
    other = generate(model, PROMPTS, GenerationConfig(12, sampling=Sampling(seed=8)))
    assert other != together


@pytest.fixture(scope="module")
def llm():
    return LLM.from_pretrained("opt-tiny", bitwidth=4, dtype="float32")


def test_what_was_asked_for_is_what_is_drawn(llm):
    greedy = llm.generate("The sea was", max_new_tokens=8)[0]
    assert llm.generate("The sea was", max_new_tokens=8, temperature=0)[0] == greedy
    assert llm.generate("The sea was", max_new_tokens=8, top_k=1)[0] == greedy
    drawn = [llm.generate("The sea was", max_new_tokens=8, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    pieces = llm.stream("The sea was", max_new_tokens=8, seed=1)
    assert "".join(pieces) == drawn[0].text


def test_a_string_ends_a_text_in_front_of_it(llm):
    whole = llm.generate(["The sea was", "He has a"], max_new_tokens=30)
    for prompt, text in ((row.prompt, row.text) for row in whole):
        for start in range(0, len(text) - 4, 7):  # they begin and end inside of tokens
            stop = text[start : start + 4]
            found = llm.generate(prompt, max_new_tokens=30, stop=[stop, "never there"])[0]
            assert found.text == text[: text.find(stop)]
            assert found.finish_reason == "stop"
            assert len(found.tokens) <= 30
            assert "".join(llm.stream(prompt, max_new_tokens=30, stop=stop)) == found.text
    assert whole[0].finish_reason == "length"


def test_a_special_token_ends_a_text_that_has_nothing_of_it(llm):
    bare = LLM(replace(llm.pretrained, generation=GenerationConfig(30)), llm.model)
    (end,) = llm.tokenizer.encode("</s>")
    whole = bare.generate("The sea was", seed=2)[0].tokens
    until = whole[: whole.index(end) + 1]
    assert 1 < len(until) < len(whole)
    found = bare.generate("The sea was", seed=2, stop=["never there", "</s>"])[0]
    assert (found.tokens, found.finish_reason) == (until, "stop")
    assert "".join(bare.stream("The sea was", seed=2, stop="</s>")) == found.text


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [("abc", ["cd"], "ab"), ("abc", ["bcd", "c"], "a"), ("ab", ["x"], "ab"), ("", ["x"], "")],
)
def test_what_may_be_the_beginning_of_a_string_waits(text, stops, left):
    assert settled(text, stops) == left


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give a number above 0"),
        ({"temperature": 0, "top_k": 5}, "greedy search, in which top_k does nothing"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"seed": -1}, "seed is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, llm):
    with pytest.raises(UserError, match=message):
        llm.generate("a", **settings)


def test_the_checkpoint_says_what_the_options_leave_open(tmp_path):
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert read_sampling(tmp_path) == Sampling(0.6, 20, 0.95)
    asked = read_sampling(tmp_path).with_changes(top_p=0.5, seed=3, min_p=None)
    assert asked == Sampling(0.6, 20, 0.5, seed=3)
    assert read_sampling(tmp_path).with_changes(top_p=None) is None
    (tmp_path / "generation_config.json").write_text('{"top_k": "x"}')
    with pytest.raises(UserError, match="top_k is 'x'"):
        read_sampling(tmp_path)


def test_the_script_says_the_seed(tmp_path):
    folder = shutil.copytree(tiny("opt"), tmp_path / "opt")
    options = ("--model-path", folder, "--prompt", "He has a", "--json", "--temperature", "0.9")
    first = json.loads(call("qllm_gen.py", *options).stdout)
    again = json.loads(call("qllm_gen.py", *options, "--seed", first["seed"]).stdout)
    assert again["results"] == first["results"]
    done = call("qllm_gen.py", *options, "--compare")
    assert done.returncode == 2 and "leave --temperature out" in done.stderr
