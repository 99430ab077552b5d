"""Perplexity in each convention against transformers in float64 sums, computed as they say it."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch
from conftest import FAMILIES, tiny
from covering import each, slow_but
from oracle import bundled, draw_prompts, our_bundled

from qllm.errors import UserError
from qllm.evaluate.perplexity import (
    CONVENTIONS,
    PerplexityOptions,
    Text,
    count_bytes,
    count_words,
    cut,
    estimate,
    exp,
    perplexity,
)
from qllm.tokenizer import Tokenizer

BITWIDTHS = ("16", "4", "8:tc-li")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WINDOWS = ((32, 16), (40, 7), (33, 33), (300, 100))  # and strides

pytestmark = pytest.mark.usefixtures("one_thread")

STORY = "Once upon a time there was a little girl, who lived in a house by the sea.\n Her name … "


@cache
@torch.no_grad()
def _losses(family: str, tokens: tuple[int, ...]) -> tuple[float, ...]:
    ids = torch.tensor(tokens)
    log_probs = bundled(family)(ids[None]).logits[0].double().log_softmax(-1)
    return tuple((-log_probs[:-1].gather(1, ids[1:, None])[:, 0]).tolist())


def losses(family: str, tokens: list[int]) -> list[float]:
    """transformers' loss of each token but the first; conventions have many windows in common."""
    return [*_losses(family, tuple(tokens))]


def gptq(family: str, text: Text, window: int, stride: int) -> float:
    """As in gptq/opt.py: nlls.append(loss * seqlen), then exp(sum / (nsamples * seqlen))."""
    nlls = []
    count = len(text.ids) // window
    for i in range(count):
        found = losses(family, list(text.ids[i * window : (i + 1) * window]))
        nlls.append(math.fsum(found) / len(found) * window)
    return math.exp(math.fsum(nlls) / (count * window))


def strided(family: str, text: Text, window: int, stride: int) -> float:
    """As in https://huggingface.co/docs/transformers/perplexity, each loss weighing the same."""
    found, before = [], 0
    for begin in range(0, len(text.ids), stride):
        end = min(begin + window, len(text.ids))
        new = end - before
        found += losses(family, list(text.ids[begin:end]))[-new:]
        before = end
        if end == len(text.ids):
            break
    assert stride == window or len(found) == len(text.ids) - 1
    return math.exp(math.fsum(found) / len(found))


def llama_cpp(family: str, text: Text, window: int, stride: int) -> float:
    """As in llama.cpp's perplexity.cpp: first = n_ctx / 2, count += n_ctx - first - 1."""
    total, count, first = 0.0, 0, window // 2
    for i in range(len(text.ids) // window):
        tokens = list(text.ids[i * window : (i + 1) * window])
        if text.added_bos_id is not None:
            tokens[0] = text.added_bos_id
        total += math.fsum(losses(family, tokens)[first:])
        count += window - first - 1
    return math.exp(total / count)


def rolling(family: str, text: Text, window: int) -> float:
    """The loss of lm-evaluation-harness's loglikelihood_rolling; every token is predicted once."""
    total, done, ids = 0.0, 0, list(text.ids)
    first = ids[:window]
    total += math.fsum(losses(family, [text.prefix_token_id, *first]))
    done = len(first)
    while done < len(ids):
        count = min(len(ids) - done, window)
        end = done + count
        total += math.fsum(losses(family, ids[end - window - 1 : end])[-count:])
        done = end
    return total


def word(family: str, text: Text, window: int, stride: int) -> float:
    return math.exp(rolling(family, text, window) / len(re.split(r"\s+", text.text)))


def byte(family: str, text: Text, window: int, stride: int) -> float:
    return math.exp(rolling(family, text, window) / len(text.text.encode("utf-8")))


ORACLES = {"gptq": gptq, "strided": strided, "llama.cpp": llama_cpp, "word": word, "byte": byte}


def story(family: str, times: int) -> Text:
    return Text.encode(STORY * times, Tokenizer.load(tiny(family)))


def test_every_convention_has_an_oracle():
    assert ORACLES.keys() == CONVENTIONS.keys()


@pytest.mark.parametrize(
    ("family", "shape"), slow_but(each(FAMILIES, WINDOWS), FAMILIES, WINDOWS), ids=str
)
def test_conventions_equal_transformers(family, shape):
    """Windows of up to 128 tokens share forward calls here; of 300 each has its own."""
    window, stride = shape
    text = story(family, 4 if window < 300 else 13)
    assert len(text.ids) % window  # a remainder, which the conventions treat differently
    options = PerplexityOptions(tuple(CONVENTIONS), window, stride)
    got = perplexity(our_bundled(family), text, options)
    assert list(got) == list(CONVENTIONS)
    for name, oracle in ORACLES.items():
        expected = oracle(family, text, window, stride)
        assert got[name] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("length", [32, 33, 64, 65])
def test_ends_of_a_text(length, stride):
    """Whole windows and nothing else, and one token more."""
    (ids,) = draw_prompts([length], 4096)
    text = Text("some words", ids, prefix_token_id=2)
    options = PerplexityOptions(tuple(CONVENTIONS), 32, stride)
    got = perplexity(our_bundled("opt"), text, options)
    for name, oracle in ORACLES.items():
        assert got[name] == pytest.approx(oracle("opt", text, 32, stride), rel=1e-5), name


def test_a_token_in_front_begins_each_of_llama_cpps_windows():
    (ids,) = draw_prompts([100], 4096)
    options = PerplexityOptions(("llama.cpp",), 32)
    plain, led = Text("", ids), Text("", ids, added_bos_id=2)
    got = [perplexity(our_bundled("opt"), text, options)["llama.cpp"] for text in (plain, led)]
    assert got[0] != got[1]
    assert got[1] == pytest.approx(llama_cpp("opt", led, 32, 0), rel=1e-5)


def test_of_text_that_a_model_knows_it_is_low_and_higher_at_one_bit():
    text = story("opt", 8)
    options = PerplexityOptions(window=64)
    good, bad = (perplexity(our_bundled("opt", b), text, options)["gptq"] for b in ("16", "1"))
    assert 1 < good < 300
    assert bad > 2 * good


@pytest.mark.parametrize(
    ("bitwidth", "dtype"), slow_but(each(BITWIDTHS, DTYPES)[:2], BITWIDTHS, DTYPES), ids=str
)
def test_batches_change_nothing(bitwidth, dtype):
    """Short windows share a call with 1, 3 or 100 others, long ones never do."""
    from cpu_paths import paths

    paths()  # skips where there are no kernels
    text, model = story("bloom", 8), our_bundled("bloom", bitwidth, dtype)
    for window in (24, 140):
        found = [
            perplexity(model, text, PerplexityOptions(("gptq", "strided"), window, batch=batch))
            for batch in (1, 3, 100)
        ]
        assert found[0] == found[1] == found[2]


def test_progress_is_given_the_windows():
    seen = []

    def progress(windows: list) -> list:
        seen.append(len(windows))
        return windows

    text = Text("", draw_prompts([50], 4096)[0])
    options = PerplexityOptions(("gptq", "strided"), 16)
    perplexity(our_bundled("opt"), text, options, progress)
    assert seen == [3, 6]


def test_the_first_tokens_of_a_text():
    tokenizer = Tokenizer.load(tiny("opt"))
    whole = Text.encode(STORY, tokenizer)
    part = Text.encode(STORY, tokenizer, 7)
    assert part.ids == whole.ids[:7]
    assert STORY.startswith(part.text) and len(part.text) > 7
    assert Text.encode(STORY, tokenizer, 10**6) == whole


@pytest.mark.parametrize(
    ("text", "words", "size"), [("a b\n\nc", 3, 6), (" a ", 3, 3), ("né", 1, 3), ("", 1, 0)]
)
def test_words_and_bytes(text, words, size):
    assert (count_words(text), count_bytes(text)) == (words, size)


def test_the_standard_error_over_windows():
    """Beside the delta method: windows of one length are as many draws of a mean."""
    text, model = story("opt", 20), our_bundled("opt")
    found = estimate(model, text, PerplexityOptions(window=20))["gptq"]
    whole = range(0, len(text.ids) - 19, 20)
    means = [sum(losses("opt", list(text.ids[i : i + 20]))) / 19 for i in whole]
    spread = torch.tensor(means, dtype=torch.float64).std().item()
    assert found.value == pytest.approx(math.exp(sum(means) / len(means)), rel=1e-4)
    assert found.error == pytest.approx(found.value * spread / len(means) ** 0.5, rel=0.15)
    alone = estimate(model, text, PerplexityOptions(window=300))["gptq"]
    assert alone.error is None


def test_a_perplexity_beyond_numbers_is_infinite():
    assert exp(1.0) == math.e
    assert exp(1e4) == math.inf


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (9, {"window": 10}, "fewer than one window of 10; give a longer one, or `window` 9"),
        (511, {}, "has 511 tokens, fewer than one window of 512"),
        (9, {"window": 10, "conventions": ("llama.cpp",)}, "fewer than one window of 10"),
        (1, {"conventions": ("strided",)}, "has 1 tokens, fewer than 2; give a longer one$"),
        (600, {"window": 513}, "513 tokens cannot be; give 2 or more, up to the model's 512"),
        (600, {"window": 1}, "a window of 1 tokens cannot be; give 2 or more"),
        (600, {"window": 32, "stride": 33, "conventions": ("strided",)}, "leaves tokens out"),
        (600, {"conventions": ("gptq", "best")}, "'best' is unknown; choose from gptq, strided"),
        (600, {"conventions": ("byte",)}, "begins with a special token, and the tokenizer names"),
    ],
)
def test_what_cannot_be_measured(length, options, message):
    with pytest.raises(UserError, match=message):
        cut(Text("", [5] * length), our_bundled("opt").config, PerplexityOptions(**options))


def test_windows_without_a_limit_of_the_model():
    text = Text("", [5] * 3000)
    (found,) = cut(text, our_bundled("bloom").config, PerplexityOptions())
    assert (found.window, len(found.windows.windows), found.tokens) == (2048, 1, 2047)
