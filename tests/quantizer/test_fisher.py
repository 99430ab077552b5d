"""The metric of errors is made of the gradients that transformers' autograd finds."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from quantizing import samples, saved
from transformers import AutoModelForCausalLM

from qllm.checkpoint.weights import Weights
from qllm.errors import WritingError
from qllm.quantizer import fisher
from qllm.quantizer.fisher import DAMP, draw_tokens, read_metric, seen_samples, write_fisher

pytestmark = pytest.mark.usefixtures("one_thread")

# The norm in front of the first layer's MLP, whose input is what is behind its attention.
NORMS = {
    "opt": "model.decoder.layers.0.final_layer_norm",
    "bloom": "transformer.h.0.post_attention_layernorm",
    "llama": "model.layers.0.post_attention_layernorm",
}


@pytest.mark.parametrize("name", NORMS)
def test_gradients_are_those_of_transformers(name, tmp_path, monkeypatch):
    """With the likeliest token in the place of one that is drawn."""
    monkeypatch.setattr(fisher, "draw_tokens", lambda p, _: p.argmax(-1, keepdim=True))
    monkeypatch.setattr(fisher, "work_dtype", lambda *_, **__: torch.float32)
    monkeypatch.setattr(fisher, "TOKENS_PER_PASS", 50)  # which two samples of 24 fit into
    monkeypatch.setattr(fisher, "LOGITS_AT_ONCE", 7 * 90)
    source, seen = saved(name, tmp_path / "source"), samples(5)
    done: list[float] = []
    with torch.no_grad():
        write_fisher(Weights.of_floats(source, print), seen, tmp_path / "f", "cpu", done.append)
    assert sum(done) == pytest.approx(1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    kept = []
    middle = model.get_submodule(NORMS[name])
    middle.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    out = model(torch.tensor(seen), output_hidden_states=True)
    kept.append(out.hidden_states[1])
    likeliest = out.logits.log_softmax(-1).max(-1).values.sum()
    for block, (x, gradient) in enumerate(
        zip(kept, torch.autograd.grad(likeliest, kept), strict=True)
    ):
        scaled = gradient * x.square().mean(-1, keepdim=True).sqrt()
        scaled = scaled.reshape(-1, scaled.shape[-1])  # OPT's states have no samples there
        expected = scaled.t() @ scaled
        expected /= expected.diagonal().mean()
        expected = (expected + DAMP * torch.eye(len(expected))) / (1 + DAMP)
        found = read_metric(tmp_path / "f", block, len(expected))
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0]).expand(20_000, -1)
    drawn = draw_tokens(p, torch.Generator().manual_seed(0))
    shares = drawn.flatten().bincount(minlength=6) / len(p)
    assert (shares[p[0] == 0] == 0).all()
    torch.testing.assert_close(shares, p[0], rtol=0, atol=0.02)


def test_a_block_that_nothing_depends_on_has_a_plain_metric(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(2 * 4 * 9))
    assert torch.equal(read_metric(path, 1, 3), torch.eye(3))


def test_enough_samples_are_looked_at_and_none_that_judge():
    seen = [[i] * 512 for i in range(128)]
    assert seen_samples(seen, 256) == seen[:16]
    assert seen_samples(seen, 4096) == seen[:32]
    assert seen_samples(seen[:16], 4096) == seen[:14]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    source = saved("opt", tmp_path / "source")
    with pytest.raises(WritingError, match=r"f cannot be written \(No space left"):
        write_fisher(Weights.of_floats(source), samples(2), tmp_path / "f", "cpu", print)
