"""Perplexity and divergence against transformers in float64 sums; where two token lists part."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import FAMILIES, tiny
from hypothesis import given
from hypothesis import strategies as st
from oracle import bundled, draw_prompts, our_bundled, prefill_logits

from qllm.errors import UserError
from qllm.evaluate import divergence, first_difference, perplexity
from qllm.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def expected(family: str, ids: list[int], window: int) -> float:
    """exp of the mean loss over whole windows, each predicted from its own beginning alone."""
    losses = []
    for start in range(0, len(ids) // window * window, window):
        tokens = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            logits = bundled(family)(tokens[None]).logits[0].double()
        log_probs = logits.log_softmax(-1)
        losses += [-log_probs[i, token].item() for i, token in enumerate(tokens[1:])]
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("length", "window"), [(200, 64), (64, 64), (129, 128), (7, 2)])
def test_perplexity_equals_transformers(family, length, window):
    (ids,) = draw_prompts([length], 4096, seed=length)
    got = perplexity(our_bundled(family), ids, window)
    assert got == pytest.approx(expected(family, ids, window), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_of_text(family):
    """Of text that the models know it is low, and lower at 16 bits than at 1."""
    text = "Once upon a time there was a little girl who lived in a house with her mother. " * 3
    ids = Tokenizer.load(tiny(family)).encode(text)
    got = perplexity(our_bundled(family), ids, 30)
    assert got == pytest.approx(expected(family, ids, 30), rel=1e-5)
    assert 1 < got < 300
    assert perplexity(our_bundled(family, "1"), ids, 30) > 2 * got


def test_progress_is_given_the_windows():
    seen = []

    def progress(windows: list) -> list:
        seen.append(windows)
        return windows

    ids = draw_prompts([50], 4096)[0]
    perplexity(our_bundled("opt"), ids, 16, progress)
    assert seen == [[ids[:16], ids[16:32], ids[32:48]]]


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_is_that_of_the_distributions(family):
    ids, model, dense = draw_prompts([70], 4096)[0], our_bundled(family, "3"), our_bundled(family)
    expected = []
    for start in (0, 32):  # the last 6 tokens are no window
        tokens = [ids[start : start + 32]]
        p = prefill_logits(bundled(family), tokens).double().softmax(-1)
        q = model.prefill(tokens, last=False).double().softmax(-1)
        expected.append((p * (p / q).log()).sum(-1).mean().item())
    assert divergence(model, dense, ids, 32) == pytest.approx(sum(expected) / 2, rel=1e-3)
    assert divergence(dense, dense, ids, 32) == pytest.approx(0, abs=1e-7)


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match="has 9 tokens, fewer than one window of 10"):
        perplexity(our_bundled("opt"), list(range(9)), 10)


@pytest.mark.parametrize(
    ("family", "window", "message"),
    [
        ("opt", 513, "a window of 513 tokens cannot be; give 2 or more, up to the model's 512"),
        ("llama", 513, "up to the model's 512"),
        ("bloom", 1, "a window of 1 tokens cannot be; give 2 or more$"),
        ("opt", 0, "give 2 or more, up to"),
    ],
)
def test_window_that_no_model_takes_is_refused(family, window, message):
    with pytest.raises(UserError, match=message):
        perplexity(our_bundled(family), [5] * 600, window)


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
