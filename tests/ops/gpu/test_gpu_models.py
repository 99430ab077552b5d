"""Whole models on the GPU kernels, and a decode step that is captured."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import tiny
from covering import each, slow_but
from inside import call_json
from oracle import load, random_model
from test_odd_models import write_tokenizer
from transformers import BloomConfig, LlamaConfig, OPTConfig

from qllm.config import EMBEDDING, QuantPlan, QuantSpec
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.models import Decoder
from qllm.ops.gpu.graph import Graph

PROMPTS = [[5, 6, 7, 8, 9], [40, 41]]
STEPS = 1
SIZES = {"vocab_size": 120, "hidden_size": 64, "max_position_embeddings": 64}
CONFIGS = {
    "opt": OPTConfig(
        **SIZES, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
    "bloom": BloomConfig(vocab_size=120, hidden_size=64, n_layer=2, n_head=4),
    "llama": LlamaConfig(
        **SIZES,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}
BITWIDTHS = ("3", "4", "8", "8:tc-li")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model of each family, small enough for the interpreter."""
    found = {}
    for family, config in CONFIGS.items():
        found[family] = tmp_path_factory.mktemp(family)
        random_model(config).save_pretrained(found[family])
    return found


def model_of(folder: Path, bitwidth: str, device: str) -> Decoder:
    spec = QuantSpec.parse(bitwidth)
    plan = QuantPlan.uniform(spec)
    if bitwidth in ("3", "4"):  # with an embedding, which is the head of OPT and BLOOM as well
        plan = plan.with_rule(EMBEDDING, spec)
    return load(folder, plan=plan, dtype=torch.float32, device=device)


def logits_of(model: Decoder, prompts: list[list[int]]) -> torch.Tensor:
    """Of some steps behind prompts: (B, STEPS + 1, V)."""
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + STEPS)
    found = [model.prefill(prompts, cache)]
    for _ in range(STEPS):
        found.append(model.decode(found[-1].argmax(-1), cache))
    return torch.stack(found, dim=1).cpu()


@pytest.fixture(scope="module")
def expected(folders):
    """The same by the CPU's kernels, before any test asks for the GPU's."""
    plans = product(CONFIGS, BITWIDTHS)
    return {plan: logits_of(model_of(folders[plan[0]], plan[1], "cpu"), PROMPTS) for plan in plans}


@pytest.mark.parametrize(
    ("family", "bitwidth"), slow_but(each(CONFIGS, BITWIDTHS), CONFIGS, BITWIDTHS)
)
def test_a_model_finds_what_it_finds_on_a_cpu(family, bitwidth, folders, expected, gpu):
    model = model_of(folders[family], bitwidth, gpu)
    layer = model.layers[0]
    assert {m.choice.kernel.name for m in (layer.mlp.down, layer.attention.qkv)} == {"triton"}
    fused = bitwidth == "8:tc-li"
    assert layer.attention_norm.op.endswith("_int8") == fused
    assert model.lm_head.choice.kernel.name == "triton"
    got, want = logits_of(model, PROMPTS), expected[family, bitwidth]
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    # int8 activations may fall to either side of a step.
    assert (got - want).abs().max() <= (0.1 if fused else 2e-3) * want.abs().max()


def test_a_script_says_which_kernels_run(gpu, tmp_path):
    config = LlamaConfig(
        **SIZES | {"vocab_size": 260},
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    random_model(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    arguments = ("--model-path", tmp_path, "--num-shards", 1, "--bitwidth", "4", "--explain")
    arguments += ("--prompt", "a", "--max-gen-tokens", "1", "--device", gpu, "--kv-bits", "8")
    rows = call_json("qllm_gen.py", *arguments)["kernels"]
    how = "decode steps: CUDA C++" if gpu == "cuda" else "integers times activations"
    assert "Triton, " in str(rows) and how in str(rows)
    assert rows[-1]["layer"] == "attention" and rows[-1]["format"] == "8-bit keys and values"


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bitwidth", ["3", "4", "8", "8:tc-li", "16"])
@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_a_captured_step_is_the_same(family, bitwidth, dtype, capsys, monkeypatch):
    plan = QuantPlan.uniform(QuantSpec.parse(bitwidth))
    model = load(tiny(family), plan=plan, dtype=dtype, device="cuda")
    cache, plain = model.new_cache(2, 40), model.new_cache(2, 40)
    tokens = model.prefill(PROMPTS, cache).argmax(-1)
    model.prefill(PROMPTS, plain)
    for _ in range(10):
        plain.captured = None
        monkeypatch.setattr(Decoder, "_one_device", False)  # not captured
        want = model.decode(tokens, plain)
        monkeypatch.undo()
        got = model.decode(tokens, cache)
        assert torch.equal(got, want)
        tokens = got.argmax(-1)
    assert isinstance(cache.captured, Graph)
    assert "without a CUDA graph" not in capsys.readouterr().err


@cuda
@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_steps_launched_ahead_find_the_same_tokens(family, monkeypatch):
    """Also where rows end at different times, and fewer are captured anew."""
    model = load(tiny(family), plan=QuantPlan.parse("4"), dtype=torch.bfloat16, device="cuda")
    prompts = [list(range(5, 6 + count)) for count in range(1, 9)]

    def found():
        lengths = dict.fromkeys(range(8), 0)

        def stop(row, token):
            lengths[row] += 1
            return lengths[row] == 24 - 3 * row

        return generate(model, prompts, GenerationConfig(max_new_tokens=30), stop=stop)

    ahead = found()
    monkeypatch.setattr("qllm.generate.computes_ahead", lambda device: False)
    assert ahead == found()
    assert list(map(len, ahead)) == [24 - 3 * row for row in range(8)]


@cuda
@pytest.mark.parametrize("bitwidth", ["3", "4", "8", "8:tc-li"])
@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_a_row_is_the_same_whatever_is_beside_it(family, bitwidth):
    plan = QuantPlan.uniform(QuantSpec.parse(bitwidth))
    model = load(tiny(family), plan=plan, dtype=torch.bfloat16, device="cuda")
    prompts = [list(range(5, 6 + 7 * i % 60)) for i in range(1, 101)]
    together = logits_of(model, prompts)
    for i in range(0, 100, 9):
        assert torch.equal(logits_of(model, [prompts[i]])[0], together[i])
    for size in (7, 33):
        for start in range(0, 100, size):
            some = slice(start, start + size)
            assert torch.equal(logits_of(model, prompts[some]), together[some])


@cuda
def test_prefill_waits_for_nothing():
    model = load(tiny("llama"), plan=QuantPlan.uniform(QuantSpec.parse("4")), device="cuda")
    model.prefill(PROMPTS)
    x = model.embed.weight[:7]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer in model.layers:
            x = layer.mlp_block(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
