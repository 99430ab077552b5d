"""A decode step that is replayed is the one that was captured, to the bit."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Sequence

import pytest
import torch
from conftest import FAMILIES, tiny
from covering import each, slow_but
from cpu_paths import on, paths, same
from oracle import draw_prompts, load, our_bundled
from quantizing import MODELS, VOCAB, saved
from torch import Tensor

from qllm.config import QuantPlan, QuantSpec
from qllm.layers.weight_only import WeightOnlyLinear
from qllm.models import Decoder
from qllm.models.cache import KVCache

BITWIDTHS = ("3", "4", "8", "8:tc-li", "16")
BATCHES = ([9], [9, 1, 33, 4, 20])
TOKENS = 24

pytestmark = pytest.mark.usefixtures("one_thread", "cpu_kernels")


def tokens_of(step: int, rows: int) -> Tensor:
    return torch.tensor(draw_prompts([rows], 4096, seed=100 + step)[0])


def begun(model: Decoder, lengths: Sequence[int], seed: int = 0) -> KVCache:
    """A cache that holds prompts of these lengths."""
    cache = model.new_cache(len(lengths), max(lengths) + TOKENS)
    model.prefill(draw_prompts(lengths, 4096, seed), cache)
    return cache


@functools.cache
def eager(family: str, bitwidth: str, lengths: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Logits of each step, none of them replayed."""
    model = our_bundled(family, bitwidth)
    cache, logits = begun(model, lengths, seed), []
    for step in range(TOKENS):
        cache.captured = None
        logits.append(model.decode(tokens_of(step, len(lengths)), cache).clone())
    return logits


def assert_decodes(model: Decoder, cache: KVCache, want: list[Tensor], first: int = 0) -> None:
    for step, logits in enumerate(want, first):
        assert same(model.decode(tokens_of(step, len(cache.lengths)), cache), logits)


def replayed(model: Decoder, lengths: Sequence[int]) -> KVCache:
    """The cache of some steps, each of which found what one that is no replay does."""
    caches = [begun(model, lengths) for _ in range(2)]
    for step in range(5):
        caches[1].captured = None
        first, second = (model.decode(tokens_of(step, len(lengths)), cache) for cache in caches)
        assert same(first, second)
    return caches[0]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FAMILIES])
def test_every_kind_of_model_is_captured(name, tmp_path):
    """And a row is the same alone, past its window too."""
    model = load(saved(name, tmp_path), "4")
    prompts = draw_prompts([7, 1, 12], VOCAB)
    caches = [model.new_cache(rows, 20) for rows in (3, 3, 1)]
    for cache, some in zip(caches, (prompts, prompts, prompts[2:]), strict=True):
        model.prefill(some, cache)
    for step in range(6):
        tokens = torch.tensor(draw_prompts([3], VOCAB, seed=step)[0])
        caches[1].captured = None
        replayed, eager, alone = (
            model.decode(some, cache)
            for some, cache in zip((tokens, tokens, tokens[2:]), caches, strict=True)
        )
        assert same(replayed, eager) and same(replayed[2:], alone)
    assert caches[0].captured.graph_break is None


@pytest.mark.parametrize(
    ("family", "bitwidth", "lengths"),
    slow_but(each(FAMILIES, BITWIDTHS, BATCHES), FAMILIES, BITWIDTHS, BATCHES),
)
def test_what_is_replayed_is_what_was_captured(family, bitwidth, lengths):
    model = our_bundled(family, bitwidth)
    cache = begun(model, lengths)
    got = [model.decode(tokens_of(0, len(lengths)), cache)]
    captured = cache.captured
    assert captured.graph_break is None
    kept = [got[0].clone()]
    for step in range(1, TOKENS):
        got.append(model.decode(tokens_of(step, len(lengths)), cache))
        kept.append(got[-1].clone())
    assert cache.captured is captured
    assert cache.lengths == [n + TOKENS for n in lengths]
    want = eager(family, bitwidth, tuple(lengths))
    for a, b, c in zip(got, kept, want, strict=True):
        assert a.dtype == torch.float32
        assert same(a, b)  # no step writes to the logits of one before
        assert same(b, c)
    # The cache holds the same as well.
    other = begun(model, lengths)
    for step in range(TOKENS):
        other.captured = None
        model.decode(tokens_of(step, len(lengths)), other)
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        assert all(map(same, ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_types_are_replayed_too(family, dtype):
    model = our_bundled(family, "4", dtype)
    assert replayed(model, [9, 1, 4]).captured.graph_break is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_quantized_from_head_to_toe(family):
    plan = QuantPlan.uniform(QuantSpec.parse("4")).with_rule("lm_head", QuantSpec.parse("8"))
    model = load(tiny(family), plan=plan)
    assert replayed(model, [9, 1, 4]).captured.graph_break is None


@pytest.mark.parametrize("where", ["embed", "layers.2.attention", "layers.5.mlp.up", "lm_head"])
def test_an_op_of_torch_breaks_the_graph(where):
    """Its results would be missing from a replay; without it all is right."""
    model = load(tiny("llama"), "4")
    want = eager("llama", "4", (9, 1, 33, 4, 20))
    hook = model.get_submodule(where).register_forward_hook(lambda module, inputs, y: y * 1)
    cache = begun(model, BATCHES[1])
    assert_decodes(model, cache, want)
    assert cache.captured.graph_break == "torch computes a part of it (mul)"
    hook.remove()
    assert_decodes(model, begun(model, BATCHES[1]), want)


def test_layers_without_a_kernel_are_not_replayed():
    """Groups of 8 are the reference's."""
    model = load(tiny("opt"), plan=QuantPlan.uniform(QuantSpec.parse("4", 8)))
    assert replayed(model, [9, 1]).captured.graph_break is not None


def test_reordered_layers_are_replayed():
    """Those of act-order, whose inputs are gathered."""
    model = load(tiny("llama"), "4")
    for name in ("attention.qkv", "mlp.down"):
        layer = model.layers[1].get_submodule(name)
        perm = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(0))
        rest = (layer.bias, layer.spec, layer.in_features)
        reordered = WeightOnlyLinear.from_packed(layer.packed._replace(perm=perm), *rest)
        reordered.process_weights_after_loading()
        model.layers[1].set_submodule(name, reordered)
    assert model.graph_break() is None
    replayed(model, [9, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_one_model_take_turns(family):
    model = our_bundled(family, "4")
    batches = ((9,), (9, 1, 33, 4, 20), (2, 40))
    wants = [eager(family, "4", lengths, seed) for seed, lengths in enumerate(batches)]
    caches = [begun(model, lengths, seed) for seed, lengths in enumerate(batches)]
    for step in range(6):
        for cache, want in zip(caches, wants, strict=True):
            assert_decodes(model, cache, [want[step]], step)
    assert len({id(cache.captured) for cache in caches}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_may_come_between_tokens(family):
    model = our_bundled(family, "4")
    lengths = tuple(BATCHES[1])
    want = eager(family, "4", lengths)
    cache = begun(model, lengths)
    for step in range(4):
        model.prefill(draw_prompts([70, 3], 4096, step), last=step % 2 == 0)
        begun(model, [8], seed=step)
        assert_decodes(model, cache, [want[step]], step)
    # A cache may begin anew, and what was captured goes on.
    captured = cache.captured
    cache.reset()
    model.prefill(draw_prompts(lengths, 4096), cache)
    assert_decodes(model, cache, want[:4])
    cache.reset()
    others = [33, 20, 2, 9, 50]
    model.prefill(draw_prompts(others, 4096, 7), cache)
    assert_decodes(model, cache, eager(family, "4", tuple(others), 7)[:4])
    assert cache.captured is captured


@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_step_keeps_what_it_reads_and_writes(family):
    """It is replayed when nothing but the cache is left of the model, and memory was used again."""
    want = eager(family, "4", (9,))
    model = load(tiny(family), "4")
    cache = begun(model, [9])
    sizes = [tensor.nbytes for tensor in model.buffers()]
    sizes += [4 * size for size in (*(1, 256, 768, 1024, 4096) * 40,)]
    assert_decodes(model, cache, want[:1])
    del model
    gc.collect()
    garbage = [torch.full((size,), 7, dtype=torch.int8) for size in sizes]
    for step in range(1, 5):
        with torch.inference_mode():
            cache.step.begin(tokens_of(step, 1))
        cache.captured.replay()
        cache.lengths = [n + 1 for n in cache.lengths]
        assert same(cache.step.logits, want[step])
    assert all((part == 7).all() for part in garbage)


@pytest.mark.parametrize("wrong", [-1, 4096, 2**40])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_outside_the_vocabulary_is_an_error(family, wrong):
    """When it is captured, and when it is replayed; what follows is not harmed by it."""
    model, lengths = our_bundled(family, "4"), BATCHES[1]
    want = eager(family, "4", tuple(lengths))
    cache = begun(model, lengths)
    for step in range(3):
        tokens = tokens_of(step, 5)
        tokens[3] = wrong
        with pytest.raises(IndexError, match="an index is outside its table"):
            model.decode(tokens, cache)
        assert cache.lengths == [n + step for n in lengths]
        assert_decodes(model, cache, [want[step]], step)
    assert cache.captured.graph_break is None


def test_a_capture_that_broke_off_is_not_replayed():
    model = load(tiny("opt"), "4")

    def stop(module, inputs) -> None:
        raise RuntimeError("enough")

    hook = model.layers[3].mlp.register_forward_pre_hook(stop)
    cache = begun(our_bundled("opt", "4"), [9])
    with pytest.raises(RuntimeError, match="enough"):
        model.decode(tokens_of(0, 1), cache)
    assert cache.captured is None
    assert cache.lengths == [9]
    hook.remove()
    assert_decodes(model, cache, eager("opt", "4", (9,))[:3])
    assert cache.captured.graph_break is None


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_may_change_between_capture_and_replay(threads):
    want = eager("llama", "4", tuple(BATCHES[1]))
    model = our_bundled("llama", "4")
    cache = begun(model, BATCHES[1])
    for step in range(6):
        torch.set_num_threads((1, threads)[step % 2])
        assert_decodes(model, cache, [want[step]], step)


def test_the_path_may_change_between_capture_and_replay():
    """Calls are captured, not the instructions that serve them."""
    model, wanted = our_bundled("opt", "4"), {}
    names = (paths()[0], "scalar")
    for name in names:
        with on(name):
            cache = begun(model, [9])
            wanted[name] = model.decode(tokens_of(0, 1), cache)
    cache = begun(model, [9])
    model.decode(tokens_of(5, 1), cache)
    for name in names:
        with on(name):
            cache.reset()
            model.prefill(draw_prompts([9], 4096), cache)
            assert same(model.decode(tokens_of(0, 1), cache), wanted[name])


def test_models_may_decode_in_threads():
    model = our_bundled("opt", "4")
    wants = [eager("opt", "4", (9,)), eager("opt", "4", (9, 1, 33, 4, 20))]
    failures = []

    def run(want: list[Tensor], lengths: Sequence[int]) -> None:
        try:
            for _ in range(3):
                assert_decodes(model, begun(model, lengths), want[:10])
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=a) for a in zip(wants, BATCHES, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
