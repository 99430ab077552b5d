"""Kernels that are compiled while weights are read: those that a model then takes."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import tiny
from oracle import load, random_model
from transformers import LlamaConfig, OPTConfig

from qllm import ops
from qllm.checkpoint import rehearsal
from qllm.models import Decoder

PROMPTS = [[5, 6, 7, 8, 9], [40, 41]]
CAPACITY = 8
# Behind the layers, where there is nothing left to be read, and in the head.
LAST = {"dense_matmul"}


@pytest.fixture
def launches(gpu, monkeypatch):
    """(thread, kernel, constants) of all that is launched in the interpreter."""
    if gpu == "cuda":
        pytest.skip("there is a GPU")
    from triton.runtime.interpreter import GridExecutor

    found, run = [], GridExecutor.__call__

    def noted(self, *given, **named):
        constants = {name: value for name, value in named.items() if name in self.constexprs}
        found.append((threading.current_thread(), self.fn.__name__, repr(constants)))
        return run(self, *given, **named)

    monkeypatch.setattr(GridExecutor, "__call__", noted)
    monkeypatch.setattr(ops, "compiles", lambda device: True)
    return found


SIZES = {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = (
    (LlamaConfig(**SIZES, intermediate_size=96), "4", 16),
    (OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64), "8:tc-li", 8),
)


@pytest.mark.parametrize(("config", "bitwidth", "kv_bits"), CONFIGS, ids=("llama", "opt"))
def test_what_a_model_launches_was_launched_before(config, bitwidth, kv_bits, launches, tmp_path):
    random_model(config).save_pretrained(tmp_path)
    lengths, shape = [len(prompt) for prompt in PROMPTS], (len(PROMPTS), CAPACITY)
    how = {"prompt_lengths": lengths, "cache_shape": shape, "kv_bits": kv_bits}
    model = load(tmp_path, bitwidth, dtype=torch.bfloat16, **how)
    before = {launch[1:] for launch in launches}
    assert before and threading.main_thread() not in {launch[0] for launch in launches}
    assert len({launch[0] for launch in launches}) == 1
    launches.clear()
    cache = model.new_cache(*shape)
    model.decode(model.prefill(PROMPTS, cache).argmax(-1), cache)
    new = {launch[1:] for launch in launches} - before
    assert {name for name, _ in new} <= LAST, new


def test_what_goes_wrong_there_is_left_to_who_needs_it(monkeypatch):
    asked = []

    def fail(self: Decoder, index: int) -> None:
        asked.append(index)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "compiles", lambda device: True)
    monkeypatch.setattr(Decoder, "only", fail)
    model = load(tiny("opt"), "4,4,3,4,8,8")
    assert asked == [0, 2, 4] and model.prefill([[5, 6]]).isfinite().all()


def test_nothing_is_rehearsed_without_a_gpu(monkeypatch):
    monkeypatch.setattr(rehearsal.Rehearsal, "_run", None)
    load(tiny("opt"), "4")
