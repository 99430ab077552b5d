"""Whole models over ranks: tensor parallel, in stages, and both, against one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import rewritten, state_of
from conftest import FAMILIES, tiny
from covering import each, slow_but
from cpu_paths import same
from oracle import draw_prompts, load, spread
from quantizing import MODELS, VOCAB, samples, saved
from ranks import on_ranks
from torch import Tensor

from qllm.calibration import Calibration
from qllm.checkpoint.convert import convert
from qllm.config import EMBEDDING, LM_HEAD, QuantPlan, QuantSpec
from qllm.errors import UserError
from qllm.generate import generate
from qllm.generation_config import GenerationConfig
from qllm.hub import ModelFolder
from qllm.models import Decoder
from qllm.parallel import shard_attention, shard_embedding, shard_mlp
from qllm.parallel.group import Group
from qllm.parallel.pipeline import ParallelContext, parse_cuts
from qllm.quantizer.checkpoint import quantize_checkpoint
from qllm.quantizer.job import Job

pytestmark = pytest.mark.usefixtures("one_thread", "cpu_kernels")

PROMPTS = draw_prompts((1, 9, 4, 6), VOCAB)
STEPS = 3  # one that is captured, and two that are replayed
GENERATION = GenerationConfig(max_new_tokens=6)


def logits_of(model: Decoder, prompts=PROMPTS) -> Tensor:
    """Of all positions of the prompts, and of some steps behind them: (N, V)."""
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + STEPS)
    found = [model.prefill(prompts, last=False), model.prefill(prompts, cache)]
    for step in range(STEPS):
        found.append(model.decode(torch.tensor([7 * step + len(p) for p in prompts]), cache))
    return torch.cat(found)


def on_mesh(
    tp: int,
    run: Callable[[ParallelContext], object],
    *,
    pp: int = 1,
    mode: str = "exact",
    cuts: tuple[int, ...] | None = None,
) -> list:
    """What a function of its context returns on each of tp x pp ranks."""

    def body(rank, links):
        stage, tp_rank = divmod(rank, tp)
        ranks = range(stage * tp, (stage + 1) * tp)
        stages = Group(range(tp_rank, tp * pp, tp), stage, links)
        return run(ParallelContext(Group(ranks, tp_rank, links), mode, stages, cuts))

    return on_ranks(tp * pp, body)


def assert_close(got: Tensor, whole: Tensor) -> None:
    """A sum in another order: the last digits of float32 differ."""
    distance = (got - whole).abs().max().item() / spread(whole)
    assert distance < 2e-5, f"{distance:.1e}"


# Ranks cut these as they cut others of MODELS, from which a norm, a bias or a tie tells them apart.
ALIKE = ("opt untied", "galactica", "bloom with normed residuals", "llama with all heads")
UNLIKE = [name for name in MODELS if name not in ALIKE]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *slow_but(each(UNLIKE, ("4", "8:tc-li")), MODELS, ("4", "8:tc-li")),
        ("bloom", "16"),
        *(pytest.param(name, "16", marks=pytest.mark.slow) for name in ("opt-350m", "llama")),
    ],
)
def test_every_model_on_as_many_ranks_as_it_has_heads_and_on_three(name, bits, sources):
    folder = sources(name)
    whole = logits_of(load(folder, bits))
    # The same integers, with activations as they are.
    exact = logits_of(load(folder, plan=QuantPlan.uniform(QuantSpec.parse("8", -1, "sym"))))
    heads = load(folder).config.num_heads
    for world, mode in ((heads, "exact"), (3, "exact"), (3, "fast")):
        got = on_mesh(
            world, lambda parallel: logits_of(load(folder, bits, parallel=parallel)), mode=mode
        )
        for logits in got:
            if mode == "exact":
                assert same(logits, whole)
                continue
            assert same(logits, got[0])
            if bits == "8:tc-li":  # each rank has scales of its own: not the same, but as good
                assert (logits - exact).norm() < 1.5 * (whole - exact).norm()
            else:
                assert_close(logits, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_of_8_bits(family, shallow_of):
    folder = shallow_of(family)
    whole = logits_of(load(folder, "4", activation_bits=8))
    assert not same(whole, logits_of(load(folder, "4")))

    def run(parallel):
        return logits_of(load(folder, "4", activation_bits=8, parallel=parallel))

    assert all(same(logits, whole) for logits in on_mesh(3, run))


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("family", "dtype"), slow_but(each(FAMILIES, DTYPES), FAMILIES, DTYPES), ids=str
)
def test_long_prompts_at_16_bits_are_exact(family, dtype, shallow_of):
    folder = shallow_of(family)
    prompts = draw_prompts((300, 100), 4096)  # more rows than a dense kernel holds at once
    whole = load(folder, dtype=dtype).prefill(prompts, last=False)

    def run(parallel):
        return load(folder, dtype=dtype, parallel=parallel).prefill(prompts, last=False)

    assert all(same(logits, whole) for logits in on_mesh(3, run))


STAGES = ((1, 3, None), (2, 2, None), (1, 2, (7,)), (3, 2, (1,)), (1, 4, (3, 4, 9)))


@pytest.mark.parametrize(
    ("family", "layout"), slow_but(each(FAMILIES, STAGES), FAMILIES, STAGES), ids=str
)
def test_stages(family, layout):
    tp, pp, cuts = layout
    prompts = draw_prompts((3, 68, 1, 5, 7), 4096)
    how = {"kv_bits": {"opt": 8, "llama": 4}.get(family, 16)}
    model = load(tiny(family), "4", **how)
    whole, tokens = logits_of(model, prompts), generate(model, prompts, GENERATION)

    def run(parallel):
        mine = load(tiny(family), "4", parallel=parallel, **how)
        return generate(mine, prompts, GENERATION), logits_of(mine, prompts)

    for found, logits in on_mesh(tp, run, pp=pp, cuts=cuts):
        assert found == tokens
        assert same(logits, whole)


MESHES = ((2, 1, "exact"), (2, 1, "fast"), (1, 2, "exact"))  # tp, pp, mode


@pytest.mark.parametrize(("family", "mesh"), slow_but(each(FAMILIES, MESHES), FAMILIES, MESHES))
def test_a_decode_step_is_captured_on_every_rank(family, mesh):
    tp, pp, mode = mesh

    def run(parallel):
        model = load(tiny(family), "4", parallel=parallel)
        cache = model.new_cache(2, 8)
        model.prefill([[5, 6], [7]], cache)
        model.decode(torch.tensor([8, 9]), cache)
        return cache.captured.graph_break

    assert on_mesh(tp, run, pp=pp, mode=mode) == [None] * tp * pp


def test_an_end_of_text_ends_its_row_in_every_stage():
    prompts = draw_prompts((3, 9, 1), 4096)
    model = load(tiny("opt"), "4")
    free = generate(model, prompts, GENERATION)
    config = GenerationConfig(
        max_new_tokens=6, eos_token_ids=(free[0][1], free[2][3]), repetition_penalty=1.1
    )
    tokens = generate(model, prompts, config)
    seen = on_mesh(
        1,
        lambda parallel: generate(load(tiny("opt"), "4", parallel=parallel), prompts, config),
        pp=2,
    )
    assert seen == [tokens, tokens] and min(map(len, tokens)) < 6


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_what_the_model_takes(family):
    def nbytes(parallel=None):
        tensors = load(tiny(family), "4", parallel=parallel).buffers()
        return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors if not t.is_meta}.values())

    whole, parts = nbytes(), on_mesh(4, nbytes)
    # Norms and positions are on every rank, and a row of scales is not cut finer than a group.
    assert max(parts) < whole / 4 + 0.1 * whole


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(("name", "bits"), [("llama", "4"), ("bloom", "8:tc-li"), ("opt", "16")])
def test_ranks_load_what_the_whole_layers_are_sharded_into(name, bits, mode, shallow_of):
    folder = shallow_of(name)
    whole = load(folder, bits)

    def run(parallel):
        layer, ours = copy.deepcopy(whole.layers[1]), load(folder, bits, parallel=parallel)
        shard_attention(layer.attention, parallel.tp, mode)
        shard_mlp(layer.mlp, parallel.tp, mode)
        embed = shard_embedding(whole.embed.weight, parallel.tp)
        assert torch.equal(embed.weight, ours.embed.weight)
        assert layer.attention.heads == ours.layers[1].attention.heads
        for key in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"):
            want, got = layer.get_submodule(key), ours.layers[1].get_submodule(key)
            assert type(got) is type(want) and got.ranges == want.ranges
            assert torch.equal(got.linear.dequantize(), want.linear.dequantize())

    on_mesh(3, run, mode=mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_copy_serves_any_number(family, tmp_path, shallow_of):
    model = ModelFolder(shallow_of(family), family)
    convert(model, tmp_path / "copy", overwrite=False)
    whole = logits_of(load(shallow_of(family), "3"))
    got = on_mesh(3, lambda parallel: logits_of(load(tmp_path / "copy", "3", parallel=parallel)))
    assert all(same(logits, whole) for logits in got)


@pytest.mark.parametrize("form", ["bin", "safetensors-sharded"])
def test_other_forms_of_files(form, tmp_path):
    folder = rewritten("bloom", tmp_path / "copy", form)
    whole = logits_of(load(tiny("bloom"), "4"))
    got = on_mesh(3, lambda parallel: logits_of(load(folder, "4", parallel=parallel)), mode="fast")
    assert_close(got[0], whole)


SAVED = {
    "gptq": ("4", {"algorithm": "gptq"}),
    "gptq, 3 bits": ("3", {"algorithm": "gptq"}),
    "compressed, 5 bits": ("5", {}),
    "int8": ("8:tc", {}),
}


@pytest.mark.parametrize(("name", "how"), slow_but(each(FAMILIES, SAVED), FAMILIES, SAVED))
def test_a_saved_quantized_checkpoint_serves_any_number(name, how, tmp_path):
    bits, spec = SAVED[how]
    source = saved(name, tmp_path / "float")
    plan = QuantPlan.uniform(QuantSpec.parse(bits, 16, **spec))
    quantize_checkpoint(Job(source, plan, samples=samples()), tmp_path / "out")
    whole = logits_of(load(tmp_path / "out"))

    def run(parallel):
        return logits_of(load(tmp_path / "out", parallel=parallel))

    assert all(same(logits, whole) for logits in on_mesh(3, run))
    assert_close(on_mesh(3, run, mode="fast")[0], whole)


@pytest.mark.parametrize(
    ("family", "outer"),
    [
        ("opt", {LM_HEAD: "4"}),
        ("opt", {LM_HEAD: "8:tc-li", EMBEDDING: "4"}),
        ("bloom", {EMBEDDING: "3"}),
        ("llama", {EMBEDDING: "8"}),
    ],
)
def test_a_packed_head_or_embedding_and_a_plan_of_many_specs(family, outer):
    rules = [(name, QuantSpec.parse(bits)) for name, bits in outer.items()]
    plan = QuantPlan((*QuantPlan.parse("2,3,8:tc-li,16,8,5").rules, *rules), 6)
    whole = logits_of(load(tiny(family), plan=plan))

    def run(parallel):
        return logits_of(load(tiny(family), plan=plan, parallel=parallel))

    for mesh in ({"tp": 3}, {"tp": 2, "pp": 2}):
        assert all(same(logits, whole) for logits in on_mesh(**mesh, run=run))


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_is_that_of_the_whole(family, shallow_of):
    calibration, folder = Calibration(), shallow_of(family)
    model = load(folder)
    for name in model.state_dict():
        if name.startswith("layers.") and name.endswith(".weight") and "norm" not in name:
            module = model.get_submodule(name.removesuffix(".weight"))
            inputs = torch.rand(module.in_features, generator=torch.Generator().manual_seed(1))
            calibration.inputs[name.removesuffix(".weight")] = inputs * 10
            calibration.outputs[name.removesuffix(".weight")] = torch.ones(module.out_features)
    whole = logits_of(load(folder, "8:tc", calibration=calibration))

    def run(parallel):
        return logits_of(load(folder, "8:tc", calibration=calibration, parallel=parallel))

    assert all(same(logits, whole) for logits in on_mesh(3, run))


def test_scales_that_one_rank_cannot_hold_in_float16_are_wide_on_all(tmp_path):
    state = {name: tensor.float() for name, tensor in state_of("opt").items()}
    state["model.decoder.layers.0.fc1.weight"][0] *= 1e8
    folder = rewritten("opt", tmp_path / "copy", "safetensors", state)
    whole = logits_of(load(folder, "4"))

    def run(parallel):
        model = load(folder, "4", parallel=parallel)
        return model.layers[0].mlp.up.linear.scales.dtype, logits_of(model)

    for dtype, logits in on_mesh(3, run):
        assert dtype == torch.float32
        assert same(logits, whole)


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(UserError, match="`tp` 9 is more than the model's 8 heads; give 1 to 8"):
        on_mesh(9, lambda parallel: load(tiny("opt"), parallel=parallel))


@pytest.mark.parametrize(
    ("text", "expected"), [("2,3.5", (4, 7)), ("0.5,1", (1, 2)), (" 1 , 5.5", (2, 11))]
)
def test_stages_by_hand(text, expected):
    assert parse_cuts(text, 6, 3) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "2", "1,2,3", "3,2", "2,2", "0,3", "2,6", "1.2,3", "nan,2"]
)
def test_stages_that_cannot_be(text):
    with pytest.raises(UserError, match=r"`stages` '.*' does not say where stages 2 to 3 of 6"):
        parse_cuts(text, 6, 3)


def test_more_stages_than_layers_are_refused(tmp_path: Path):
    folder = saved("opt", tmp_path)
    with pytest.raises(UserError, match="`pp` 5 is more than the model's 2 layers; give 1 to 2"):
        on_mesh(1, lambda parallel: load(folder, parallel=parallel), pp=5)
