"""The reference is what the model's own equations say, whichever version of transformers runs."""

from __future__ import annotations

import pytest
import torch
from foreign import folder_of
from foreign_floats import CASES as FLOATS
from oracle import not_by_older
from quantizing import saved
from transformers import AutoModelForCausalLM

from qllm.huggingface import load_reference


def test_scores_are_capped_whatever_attention_transformers_would_choose(tmp_path):
    """In transformers 5.17 it would be one that knows no cap."""
    source, ids = saved("gemma2", tmp_path / "source"), torch.arange(3, 19)[None]
    found, plain = (
        model(ids).logits
        for model in (
            load_reference(source, dtype=torch.float32),
            AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation="eager"
            ),
        )
    )
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    "kind",
    [
        "FP8 in blocks",
        pytest.param("FP8 of compressed-tensors, one scale", marks=not_by_older),
    ],
)
def test_the_reference_of_small_floats_is_their_numbers(kind, tmp_path):
    case = FLOATS[kind]
    folder = folder_of(case.family, case.write, case.config)
    folder.write(tmp_path / "model")
    model = load_reference(tmp_path / "model", dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, weight in folder.twin.named_parameters():  # which it rounds to bfloat16 for a while
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=2**-7, atol=0)
