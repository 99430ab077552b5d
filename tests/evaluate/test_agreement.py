"""Agreement with transformers against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from covering import each, slow_but
from oracle import (
    assert_logits_close,
    bundled,
    draw_prompts,
    load,
    our_bundled,
    prefill_logits,
    pretrained,
    reference,
)
from quantizing import VOCAB

from qllm.evaluate.agreement import (
    DecoderReference,
    ReferenceOutputs,
    agreement,
    layer_outputs,
    quantile,
)
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.huggingface import HuggingFaceModel
from qllm.report import first_difference

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES = draw_prompts([70, 33, 5], 4096)
PROMPTS = draw_prompts([4, 9, 2], 4096, seed=1)
COUNT = 8


def theirs(family: str) -> HuggingFaceModel:
    return HuggingFaceModel(bundled(family), our_bundled(family).config)


KINDS = (theirs, lambda family: DecoderReference(our_bundled(family)))


@pytest.mark.parametrize(("family", "kind"), slow_but(each(FAMILIES, KINDS), FAMILIES, KINDS))
def test_agreement_is_what_it_says(family, kind):
    model = our_bundled(family, "3")
    kls, same = [], []
    for sequence in SEQUENCES:
        p = prefill_logits(bundled(family), [sequence]).double().log_softmax(-1)
        q = model.prefill([sequence], last=False).double().log_softmax(-1)
        kls.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    kl = torch.cat(kls)
    found = agreement(model, ReferenceOutputs.of(kind(family), SEQUENCES, PROMPTS, COUNT))
    assert found["positions"] == len(kl) == sum(map(len, SEQUENCES))
    assert found["same_top"] == torch.cat(same).double().mean().item()
    assert found["kl"]["mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["kl"]["max"] == pytest.approx(kl.max().item(), rel=1e-3)
    for share in (50, 90, 99):
        nearest = torch.quantile(kl, share / 100, interpolation="higher").item()
        assert found["kl"][f"p{share}"] == pytest.approx(nearest, rel=1e-3)
    want = reference(bundled(family), PROMPTS, max_new_tokens=COUNT).tokens
    got = generate(model, PROMPTS, GenerationConfig(COUNT))
    lengths = [first_difference(*pair) for pair in zip(got, want, strict=True)]
    lengths = [COUNT if length is None else length for length in lengths]
    assert found["prefix"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["prefix"] | {"mean": 0} == {
        "mean": 0,
        "median": sorted(lengths)[1],
        "min": min(lengths),
        "of": COUNT,
        "prompts": len(PROMPTS),
    }
    assert len(found["layers"]) == 6
    assert 0.001 < found["layers"][0] < found["layers"][-1] < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_agrees(family):
    found = agreement(
        our_bundled(family), ReferenceOutputs.of(theirs(family), SEQUENCES, PROMPTS, COUNT)
    )
    assert found["kl"]["max"] < 1e-6
    assert found["same_top"] == 1
    assert found["prefix"]["min"] == COUNT
    assert max(found["layers"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_layers_are_those_of_transformers(family):
    model = bundled(family)
    hidden = model(torch.tensor([SEQUENCES[0]]), output_hidden_states=True).hidden_states
    layers = theirs(family).layers()
    hooks = [len(layer._forward_hooks) for layer in layers]  # transformers has some of its own
    outputs = layer_outputs(theirs(family), layers, SEQUENCES[0])
    assert len(outputs) == 6
    # The last of transformers' is behind the final norm.
    for output, expected in zip(outputs[:-1], hidden[1:-1], strict=True):
        assert torch.equal(output, expected[0])
    assert [len(layer._forward_hooks) for layer in layers] == hooks


@torch.inference_mode()
@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_logits_of_references_are_divided_and_capped(name, sources):
    folder, prompts = sources(name), draw_prompts([9, 3], VOCAB)
    model, ours = pretrained(folder), load(folder)
    want = prefill_logits(model, prompts)
    for found in (HuggingFaceModel(model, ours.config), DecoderReference(ours)):
        hidden = found.hidden(prompts)
        assert_logits_close(found.head()(hidden), want)
        assert_logits_close(found.logits(hidden), want)


def test_without_prompts_there_is_no_prefix():
    sequences = SEQUENCES[2:]
    found = agreement(our_bundled("opt"), ReferenceOutputs.of(theirs("opt"), sequences))
    assert "prefix" not in found


def test_prompts_of_one_length_are_continued_as_each_alone():
    prompts = draw_prompts([7, 7, 7], 4096, seed=2)
    found = theirs("bloom").greedy(prompts, 6)
    assert found == [theirs("bloom").greedy([prompt], 6)[0] for prompt in prompts]


def test_quantiles():
    values = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert [quantile(values, share) for share in (0, 0.5, 0.75, 0.99, 1)] == [1, 3, 4, 4, 4]
