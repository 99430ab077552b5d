"""Layers that take keys and values of those in front of them, and inputs of their own: Gemma 4."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_paths import same
from oracle import draw_prompts, load
from quantizing import VOCAB, samples, saved
from safetensors.torch import load_file, save_file

from qllm.config import QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.models.partition import keep_stage
from qllm.plan import measure
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "gemma4_text with inputs of layers"
PROMPTS = draw_prompts([38, 9, 21], VOCAB)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(NAME, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_long_prompt_comes_in_pieces(bits, source):
    """Runs of integers are complete in the midst of some; a layer's own tokens are written twice.

    At 16 bits layers that share have one memory, of which the size is counted once.
    """
    model = load(source, kv_bits=bits)
    whole, cut = model.new_cache(3, 80), model.new_cache(3, 80)
    cut.pass_tokens = 7
    assert same(model.prefill(PROMPTS, whole), model.prefill(PROMPTS, cut))
    for token in range(40):  # past the end of a run
        tokens = torch.tensor([token, token + 1, token + 2])
        assert same(model.decode(tokens, whole), model.decode(tokens, cut))
    assert (whole.layers[0] is whole.layers[2]) == (bits == 16)
    held = {id(kv): sum(part.nbytes for part in kv) for kv in whole.layers}
    assert sum(held.values()) == model.cache_bytes(3, 80)


def test_keys_and_values_that_no_layer_needs(source, tmp_path):
    """Files have them of layers that take those of others."""
    tensors = load_file(source / "model.safetensors")
    for part in ("k_proj", "v_proj", "k_norm"):
        name = f"model.layers.{{}}.self_attn.{part}.weight"
        tensors[name.format(2)] = torch.full_like(tensors[name.format(0)], torch.nan)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert same(load(tmp_path).prefill(PROMPTS), load(source).prefill(PROMPTS))


def test_what_does_not_know_them_says_so(source, tmp_path):
    spec = QuantSpec.parse("4")
    with pytest.raises(UserError, match="tuning does not know this gemma4_text"):
        tuned = QuantPlan.uniform(replace(spec, algorithm="signround"))
        quantize_checkpoint(Job(source, tuned, samples=samples()), tmp_path / "out")
    with pytest.raises(UserError, match="the planner does not know this gemma4_text"):
        measure.measure(measure.Job(source, (spec,), samples(), samples()))
    with pytest.raises(UserError, match="`pp` does not know this gemma4_text"):
        keep_stage(load(source), None, range(4))
