"""The reference is what the model's own equations say, whichever version of transformers runs."""

from __future__ import annotations

import torch
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
