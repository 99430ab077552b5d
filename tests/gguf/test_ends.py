"""Tokens that end a text by what a vocabulary calls them."""

from __future__ import annotations

import pytest

from qllm.gguf.config import CONTROL, named_ends

NORMAL = 1
VOCABULARIES = {
    "ChatML's": (["a", "<|im_end|>", "<|end|>"], {1, 2}),
    # gpt-oss's answers have several parts, of which each ends in another token.
    "Harmony's": (["a", "<|return|>", "<|call|>", "<|end|>"], {1, 2}),
    "of a part of Harmony's": (["a", "<|return|>", "<|end|>"], {1, 2}),
    "of none": (["a", "b"], set()),
}


@pytest.mark.parametrize("kind", [NORMAL, CONTROL])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_ends_by_their_names(name, kind):
    tokens, ends = VOCABULARIES[name]
    assert named_ends(tokens, [kind] * len(tokens)) == ends
