"""The cache's borders: nothing is written outside of them, whoever asks."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from cpu_paths import same
from oracle import assert_logits_close, draw_prompts, our_bundled

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = draw_prompts([9, 4, 11], 4096)


def tensors(cache) -> list[torch.Tensor]:
    return [*cache.keys, *cache.values]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_can_be_filled_to_the_end(family):
    model = our_bundled(family)
    tight, wide = model.new_cache(3, 14), model.new_cache(3, 40)
    assert same(model.prefill(PROMPTS, tight), model.prefill(PROMPTS, wide))
    for token in range(3):
        tokens = torch.tensor([token, 7, 9])
        assert same(model.decode(tokens, tight), model.decode(tokens, wide))
    assert tight.lengths == [12, 7, 14]
    before = [part.clone() for part in tensors(tight)]
    for _ in range(2):
        with pytest.raises(IndexError, match=r"^15 tokens in a cache for 14$"):
            model.decode(tokens, tight)
        assert tight.lengths == [12, 7, 14]
        assert all(map(same, tensors(tight), before))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_first_token_beyond_the_end_is_refused(family):
    model = our_bundled(family)
    cache = model.new_cache(1, 5)
    model.prefill([[1, 2, 3, 4, 5]], cache)
    with pytest.raises(IndexError, match=r"^6 tokens in a cache for 5$"):
        model.decode(torch.tensor([1]), cache)
    assert cache.tape is None


def test_a_prompt_that_does_not_fit_is_refused():
    model = our_bundled("opt")
    cache = model.new_cache(3, 10)
    with pytest.raises(IndexError, match=r"^11 tokens in a cache for 10$"):
        model.prefill(PROMPTS, cache)
    assert not any(part.any() for part in tensors(cache))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_cache_has_one_row_per_prompt(rows):
    cache = our_bundled("opt").new_cache(rows, 20)
    with pytest.raises(ValueError, match=f"^3 prompts for a cache of {rows} rows$"):
        our_bundled("opt").prefill(PROMPTS, cache)
    assert not any(part.any() for part in tensors(cache))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_holds_the_same_however_its_tokens_came(family):
    """As a prompt or one by one: only attention, behind the first keys, sums in another order."""
    model = our_bundled(family, "4")
    whole, single = model.new_cache(3, 20), model.new_cache(3, 20)
    last = model.prefill([prompt[:4] for prompt in PROMPTS], whole)
    model.prefill([prompt[:1] for prompt in PROMPTS], single)
    for i in range(1, 4):
        logits = model.decode(torch.tensor([prompt[i] for prompt in PROMPTS]), single)
    for a, b in ((whole.keys, single.keys), (whole.values, single.values)):
        assert same(a[0], b[0])
        assert_logits_close(torch.stack(a), torch.stack(b))
        assert not any(part[:, :, 4:].any() for part in (*a, *b))
    assert_logits_close(logits, last)
