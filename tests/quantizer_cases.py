"""Shared by tests of quantizing: models, plans, and what is compared of saved folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import assert_logits_close, draw_prompts, load, prefill_logits
from quantizing import VOCAB
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qllm.config import QuantPlan, QuantSpec
from qllm.models import Decoder
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job
from qllm.quantizer.layer import LinearReport

SMALL = ("opt", "opt-350m", "bloom", "llama")  # one of each layout of tensors
LAYOUTS = [
    *SMALL,
    "opt untied",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2", "phi3")),
]
PROMPTS = draw_prompts([7, 1, 12], VOCAB)


def plan_of(
    value: object, head: str | None = None, *, group_size: int = 16, **default: str
) -> QuantPlan:
    """A plan of a bitwidth or of rules, and of --lm-head-bits."""
    spec = QuantSpec(group_size=group_size, **default)
    if isinstance(value, dict):
        plan = QuantPlan.from_json(value, default=spec)
    else:
        plan = QuantPlan.parse(str(value), spec)
    return plan if head is None else plan.with_rule("^lm_head$", QuantSpec.from_json(head, spec))


def quantize(source: Path, target: Path, plan: QuantPlan, **job) -> list[LinearReport]:
    return quantize_checkpoint(Job(source, plan, **job), target)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """What is in a folder's files, whichever they are."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_same_tensors(ours: Decoder, theirs: Decoder) -> None:
    """Two models hold the same, tensor by tensor, and say the same of it."""
    specs = [
        {n: m.spec for n, m in model.named_modules() if hasattr(m, "spec")}
        for model in (ours, theirs)
    ]
    assert specs[0] == specs[1]
    first, second = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def assert_saved_and_fake_agree(source: Path, folder: Path, plan: QuantPlan, **job) -> Decoder:
    """The saved model computes what transformers does with its dequantized twin; returns it."""
    reports = quantize(source, folder / "saved", plan, **job)
    assert quantize(source, folder / "fake", plan, fake=True, **job) == reports
    ours = load(folder / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "fake", dtype=torch.float32, attn_implementation="eager"
    )
    assert_logits_close(ours.prefill(PROMPTS, last=False), prefill_logits(theirs, PROMPTS))
    assert_logits_close(
        load(folder / "fake").prefill(PROMPTS, last=False), prefill_logits(theirs, PROMPTS)
    )
    return ours


def relative(error: Tensor, whole: Tensor) -> float:
    return (error.double().square().sum() / whole.double().square().sum()).sqrt().item()
